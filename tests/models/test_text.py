import re
from pathlib import Path

import pytest
import torch
from saved_models import TEXT_WIDTH, save_text_encoder, save_tokenizer
from torch.testing import assert_close

from speedit_plugins.registry import TEXT_ENCODERS, build
from speedit_plugins.trainer.models.pretrained.text import CaptionTable, TextEncoder, dropped

KINDS = ("t5", "clip", "whole clip", "bert")


def saved(folder: Path, kind: str) -> Path:
    save_tokenizer(folder)
    save_text_encoder(folder, kind)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return TextEncoder(str(saved(tmp_path_factory.mktemp("encoder"), "t5")), max_length=6)


@pytest.mark.parametrize("kind", KINDS)
def test_captions_become_features_of_one_length(tmp_path: Path, kind: str) -> None:
    encoder = build(
        TEXT_ENCODERS, {"type": "TextEncoder", "path": str(saved(tmp_path, kind)), "max_length": 6}
    )
    features = encoder.encode(["a red heart", ""])
    assert features["tokens"].shape == (2, 6, TEXT_WIDTH)
    # Three words and the end; the end alone.
    assert features["mask"].tolist() == [[True] * 4 + [False] * 2, [True] + [False] * 5]
    assert not features["tokens"][1, 1:].any()
    assert (encoder.width, encoder.max_length, encoder.num_cut) == (TEXT_WIDTH, 6, 0)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_features_are_those_of_transformers(encoder: TextEncoder) -> None:
    ids = torch.tensor([[3, 4, 6, 1]])  # a red heart </s>, unpadded
    expected = encoder.model(input_ids=ids).last_hidden_state
    assert_close(encoder.encode(["a red heart"])["tokens"][:, :4], expected, rtol=0, atol=1e-6)


def test_padding_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    encoder = TextEncoder(str(saved(tmp_path, "clip")), max_length=6, attend_padding=True)
    features = encoder.encode(["a red heart"])
    ids = torch.tensor([[3, 4, 6, 1, 0, 0]])  # a red heart </s> <pad> <pad>
    assert_close(features["tokens"], encoder.model(input_ids=ids).last_hidden_state, rtol=0, atol=1e-6)
    assert features["mask"].all()


def test_a_whole_clip_gives_its_text_tower(tmp_path: Path) -> None:
    from transformers import CLIPModel

    path = saved(tmp_path, "whole clip")
    ids = torch.tensor([[3, 4, 6, 1]])  # a red heart </s>
    expected = CLIPModel.from_pretrained(path).text_model(input_ids=ids).last_hidden_state
    found = TextEncoder(str(path), max_length=4).encode(["a red heart"])["tokens"]
    assert_close(found, expected, rtol=0, atol=1e-6)


def test_long_captions_are_cut_counted_and_warned_of_once(encoder: TextEncoder) -> None:
    encoder.num_cut = 0
    with pytest.warns(UserWarning, match=r"a caption of 8 tokens is cut to max_length 6: 'a a a a a a a'"):
        features = encoder.encode(["a a a a a a a", "a heart", "red red red red red red red red"])
    assert features["mask"].sum(1).tolist() == [6, 3, 6]
    assert encoder.num_cut == 2
    encoder.encode(["a a a a a a a"])
    assert encoder.num_cut == 3


def test_a_table_gives_the_encoders_features_without_it(encoder: TextEncoder) -> None:
    captions = ["a red heart", "a green apple", "", "a red heart"]
    table = CaptionTable.of(encoder, captions, batch_size=2)
    asked = ["", "a red heart", ""]
    assert_close(table.encode(asked), encoder.encode(asked), rtol=0, atol=1e-6)
    assert (table.width, table.max_length) == (TEXT_WIDTH, 6)
    with pytest.raises(ValueError, match="the table of 3 captions does not contain 'a blue heart'"):
        table.encode(["a blue heart"])


def test_a_table_does_not_depend_on_the_order_of_captions(encoder: TextEncoder) -> None:
    captions = ["a red heart", "a green apple", "", "7", "3 moving left"]
    first, second = (CaptionTable.of(encoder, order, batch_size=2) for order in (captions, captions[::-1]))
    assert_close(first.encode(captions), second.encode(captions), rtol=0, atol=0)


def test_dropped_captions_become_the_empty_one(encoder: TextEncoder) -> None:
    features, null = encoder.encode(["a red heart", "a green apple", "7"]), encoder.encode([""])
    found = dropped(features, null, torch.tensor([False, True, False]))
    for name, value in found.items():
        assert_close(value[1], null[name][0], rtol=0, atol=0)
        assert_close(value[[0, 2]], features[name][[0, 2]], rtol=0, atol=0)


def test_what_is_wrong_with_an_encoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no text encoder with a tokenizer found at '.*absent': .*give the folder"
    ):
        TextEncoder(str(tmp_path / "absent"))
    for kind in ("clip", "whole clip"):
        path = str(saved(tmp_path / kind, kind))
        with pytest.raises(ValueError, match=re.escape("needs max_length <= 77, got 100")):
            TextEncoder(path, max_length=100)
    with pytest.raises(ValueError, match="needs max_length >= 2, got 1"):
        TextEncoder(path, max_length=1)
    with pytest.raises(ValueError, match="needs dtype float32, bfloat16 or float16, got 'int8'"):
        TextEncoder(path, dtype="int8")


def test_the_embedded_encoder_knows_what_is_alike() -> None:
    encoder = build(TEXT_ENCODERS, {"type": "MiniLM", "max_length": 16})
    features = encoder.encode(["a kitten", "a young cat", "a spreadsheet"])
    assert features["tokens"].shape == (3, 16, 384)
    mean = features["tokens"].sum(1) / features["mask"].sum(1, keepdim=True)
    near, far = torch.cosine_similarity(mean[:1], mean[1:]).tolist()
    assert near > far + 0.2
