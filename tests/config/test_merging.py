"""What a new type, or a measurement that is turned off, leaves behind."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig

IMAGES = {"type": "ImageFolder", "root": "x", "image_size": "${image_size}"}
LEAF: dict[str, Any] = {
    "experiment_dir": "x",
    "image_size": 8,
    "num_classes": 10,
    "model": {"type": "DiT-B/2", "norm": "rms", "rope": True, "num_classes": 10, "input_size": 8},
    "optimizer": {"type": "AdamW", "lr": 1e-3, "warmup_steps": 2},
    "data": {"dataset": IMAGES, "batch_size": 2},
    "max_training_steps": 10,
}


def written(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return file


def test_what_a_type_on_the_command_line_leaves_out_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = written(tmp_path / "leaf.yaml", LEAF)

    def lines(*overrides: str) -> list[str]:
        caplog.clear()
        load_config(file, "train", overrides)
        return caplog.messages

    assert lines("model.type=DiT-S/2", "optimizer.type=Muon") == [
        "model.type=DiT-S/2 leaves out what belonged to model.type DiT-B/2: norm, rope",
        "optimizer.type=Muon leaves out what belonged to optimizer.type AdamW: lr",
    ]
    # Keys that are given again, and a config's own change of a type, are what somebody wrote.
    given = "model={type: DiT-S/2, norm: rms, rope: false}"
    assert lines(given, "model.depth=3", "model.norm=layer", "data.dataset.type=ImageFolder") == []
    assert lines("data.dataset=Digits") == [
        "data.dataset.type=Digits leaves out what belonged to data.dataset.type ImageFolder: root"
    ]
    file = written(tmp_path / "below" / "leaf.yaml", {"model": {"type": "DiT-S/2"}})
    written(tmp_path / "below" / "base.yaml", LEAF)
    assert lines() == []


def test_a_measurement_that_is_turned_off_takes_its_keys_along(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measured = {"validate_every": 5, "validate_samples": 7, "evaluate_every": 5, "evaluate_samples": 30}
    data = {**LEAF["data"], "validation": {"type": "Digits"}}
    leaf = {**LEAF, **measured, "data": data, "keep_best": "fid", "guidance_scale": 1.0}
    file = written(tmp_path / "leaf.yaml", leaf)

    def loaded(*overrides: str, of: Path = file) -> ExperimentConfig:
        caplog.clear()
        return load_config(of, "train", overrides)

    kept = loaded()
    assert caplog.messages == []
    found = loaded("evaluate_every=0")
    assert caplog.messages == ["evaluate_every=0 leaves out evaluate_samples, keep_best"]
    assert (found.evaluate_every, found.evaluate_samples, found.keep_best) == (0, 1000, None)
    # The other measurement stays.
    assert (found.validate_samples, found.data.validation) == (7, kept.data.validation)
    found = loaded("validate_every=0")
    assert caplog.messages == ["validate_every=0 leaves out validate_samples, data.validation"]
    assert (found.validate_samples, found.data.validation, found.keep_best) == (500, None, "fid")
    # The phase test compares shapes with their validation set.
    shapes = load_config("configs/shapes/digits.yaml", "train", ["validate_every=0"])
    assert shapes.data.validation == load_config("configs/shapes/digits.yaml", "test").data.validation
    assert shapes.data.validation is not None
    # What is given with it, or without it, contradicts it.
    for overrides, message in (
        (
            ("evaluate_every=0", "evaluate_samples=9"),
            "evaluate_samples: has no effect without evaluate_every",
        ),
        (("evaluate_every=0", "keep_best=kid"), "keep_best: kid is not measured with evaluate_every: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded(*overrides)
    # A file may turn it off too, and one over that on again: then the first file's keys hold.
    written(tmp_path / "base.yaml", leaf)
    quiet = written(tmp_path / "quiet.yaml", {"evaluate_every": 0})
    assert loaded(of=quiet).evaluate_samples == 1000
    assert caplog.messages == []
    again = loaded("evaluate_every=3", of=quiet)
    assert (again.evaluate_every, again.evaluate_samples, again.keep_best) == (3, 30, "fid")
