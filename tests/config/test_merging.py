"""What a new type leaves behind."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from speedit_plugins.trainer.config.loading import load_config


def written(file: Path, content: dict[str, Any]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(content)))
    return file


def test_what_a_type_on_the_command_line_leaves_out_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = {"type": "ImageFolder", "root": "x", "image_size": "${image_size}"}
    leaf = {
        "experiment_dir": "x",
        "image_size": 8,
        "num_classes": 10,
        "model": {"type": "DiT-B/2", "norm": "rms", "rope": True, "num_classes": 10, "input_size": 8},
        "optimizer": {"type": "AdamW", "lr": 1e-3, "warmup_steps": 2},
        "data": {"dataset": images, "batch_size": 2},
        "max_training_steps": 10,
    }
    file = written(tmp_path / "leaf.yaml", leaf)

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
    written(tmp_path / "below" / "base.yaml", leaf)
    assert lines() == []
