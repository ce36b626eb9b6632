"""Which caption the nearest training image of a sample has."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from speedit_plugins.trainer.evaluation.features import Pixels


@pytest.fixture
def faithfulness(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("captions.emoji")


def images(number: int) -> Tensor:
    """uint8 (N, 4, 4, 3), one bright pixel in each, at another place."""
    found = torch.zeros(number, 48, dtype=torch.uint8)
    found[torch.arange(number), torch.arange(number)] = 200
    return found.view(number, 4, 4, 3)


def test_ranks_count_the_images_that_are_nearer(faithfulness: ModuleType) -> None:
    nearest = faithfulness.NearestCaptions(images(8), list("abcdefgh"), Pixels())
    assert nearest.ranks(images(8), list("abcdefgh")).tolist() == [0] * 8
    # A sample with pixels 1, 2, 3 and 0 from bright to dark is nearest to b, then c, d, a.
    sample = torch.zeros(1, 48, dtype=torch.uint8)
    sample[0, :4] = torch.tensor([50, 200, 150, 100], dtype=torch.uint8)
    ranks = nearest.ranks(sample.view(1, 4, 4, 3).expand(4, 4, 4, 3), list("bcda"))
    assert ranks.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="captions of the training set, got 'z'"):
        nearest.ranks(images(1), ["z"])


def test_shares_and_columns_count_samples(faithfulness: ModuleType) -> None:
    ranks = torch.tensor([0, 0, 4, 5, 90, 0])
    found = faithfulness.shares(ranks)
    assert (found.top1, found.top5) == (3 / 6, 4 / 6)
    # Right: 2 of 3 samples of a, 0 of 1 of b, 1 of 2 of c.
    assert faithfulness.num_right_columns(ranks, list("aaabcc")) == 2


def test_a_training_and_its_run_are_scored(
    faithfulness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    """The network is replaced by the pixels: it takes long for 1,911 images."""
    monkeypatch.setattr(faithfulness, "EfficientNetLite0", lambda resize: Pixels(pool=4))
    small = [
        "model={type: TextDiT, patch_size: 8, hidden_size: 16, depth: 1, num_heads: 2}",
        "sampler.num_steps=1",
        "text_encoder.max_length=4",
        "samples_per_class=1",
        "optimizer.warmup_steps=1",
    ]
    out = tmp_path / "scores.json"
    arguments = ["--steps", "2", "--captions", "3", "--per-caption", "2", "--json", str(out)]
    monkeypatch.setattr("sys.argv", ["emoji_faithfulness", *arguments, *small])
    faithfulness.main()
    chance, trained = json.loads(out.read_text())
    # One in 1,911, and five.
    assert (chance["top1"], chance["top5"]) == (1 / 1911, 5 / 1911)
    assert (trained["num_samples"], trained["num_columns"]) == (6, 6)
    assert capsys.readouterr().out.count("top1") == 3
