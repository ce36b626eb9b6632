from pathlib import Path
from typing import Any

import pytest
import torch
from runs import small_config
from torch import nn
from torch.testing import assert_close

from speedit_plugins.trainer.sampling.conditions import (
    all_conditions,
    grid_conditions,
    null_condition,
    prompts,
)

CPU = torch.device("cpu")
T2I = "configs/text_to_image/emoji_pixart.yaml"


def config(phase: str = "sample", **changes: Any) -> Any:
    from speedit_plugins.trainer.config.loading import load_config

    return load_config(T2I, phase, [f"{key}={value}" for key, value in changes.items()])


class Lengths:
    width, max_length, num_cut = 1, 1, 0

    def encode(self, captions: Any) -> dict[str, torch.Tensor]:
        return {"tokens": torch.tensor([[[float(len(caption))]] for caption in captions])}


def test_a_grid_has_the_classes_asked_for(tmp_path: Path) -> None:
    found = grid_conditions(small_config(tmp_path, "sample", sample_classes="[7,1]"), None)
    assert found.names == ("7", "1")
    labels = found.of(torch.tensor([1, 0, 0]), CPU)
    assert isinstance(labels, torch.Tensor)
    assert labels.tolist() == [1, 7, 7]


def test_classes_have_names_and_numbers(tmp_path: Path) -> None:
    named = small_config(tmp_path, "sample", sample_classes="[cat, 2, 9]")
    found = grid_conditions(named, None, ("ant", "cat", "dog"))
    # The model has room for ten classes, the data have three.
    assert found.titles == found.names == ("cat", "dog", "9")
    assert found.labels is not None
    assert found.labels.tolist() == [1, 2, 9]
    # Numbers alone say nothing that the order of the columns does not.
    assert grid_conditions(small_config(tmp_path, "sample", sample_classes="[1]"), None).titles == ()
    with pytest.raises(ValueError, match=r"unknown class 'cat'; did you mean 'cats'\?; known: ants, cats$"):
        grid_conditions(named, None, ("ants", "cats"))
    many = [f"class {number}" for number in range(23)]
    with pytest.raises(ValueError, match=r"known: class 0, .*, class 19, and 3 more$"):
        grid_conditions(named, None, many)
    with pytest.raises(ValueError, match="got the name 'cat', and neither the checkpoint nor the data name"):
        grid_conditions(named, None)


def test_a_large_set_is_of_all_classes(tmp_path: Path) -> None:
    found = all_conditions(small_config(tmp_path, "inference"), None)
    assert found.names == tuple("0123456789")


def test_prompts_are_encoded_when_they_are_asked_for() -> None:
    found = grid_conditions(config(sample_prompts="[red,green]"), Lengths())
    assert found.names == ("red", "green")
    condition = found.of(torch.tensor([1, 0]), CPU)
    assert isinstance(condition, dict)
    assert condition["tokens"].flatten().tolist() == [5, 3]


def test_prompts_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red heart\n\n  a sun \n")
    assert prompts(config(sample_prompts="[]", prompts_file=path)) == ["a red heart", "a sun"]
    path.write_text("\n")
    with pytest.raises(ValueError, match="needs at least one prompt, got .*prompts.txt without any"):
        prompts(config(sample_prompts="[]", prompts_file=path))
    with pytest.raises(ValueError, match="prompts_file needs a text file, a prompt a line, got .*absent"):
        prompts(config(sample_prompts="[]", prompts_file=tmp_path / "absent"))


class Model(nn.Module):
    null_label = 10
    null_text = {"tokens": torch.full((1, 1, 1), -1.0)}


def test_the_null_condition_keeps_what_is_concatenated() -> None:
    model, extra = Model(), torch.rand(2, 1, 1, 1)
    assert_close(null_condition(model, torch.tensor([1, 2])), torch.tensor([10, 10]))
    found = null_condition(model, {"label": torch.tensor([1, 2]), "extra": extra})
    assert_close(found, {"label": torch.tensor([10, 10]), "extra": extra})
    text = null_condition(model, {"tokens": torch.rand(2, 1, 1), "extra": extra})
    assert_close(text, {"tokens": torch.full((2, 1, 1), -1.0), "extra": extra})


def test_a_model_without_a_null_label_is_refused() -> None:
    model = Model()
    model.null_label = None  # type: ignore[assignment]  # for the test
    with pytest.raises(ValueError, match="guidance needs a model with class_dropout_prob > 0"):
        null_condition(model, torch.tensor([1]))
