"""Validation and evaluation in trainings on captions and videos."""

import json
from pathlib import Path
from typing import Any

import pytest

from speedit_plugins.cli import main

MOVING, EMOJI = "configs/text_to_video/moving_digits_latte.yaml", "configs/text_to_image/emoji_pixart.yaml"
NARROW = ("model.num_layers=1", "model.num_heads=2", "model.head_dim=8", "data.batch_size=4")
SHORT = (
    *("enable_tensorboard_log=false", "log_every=1", "optimizer.warmup_steps=1", "max_training_steps=2"),
    *("sampler.num_steps=2", "evaluate_every=2", "evaluate_samples=5", "per_proc_batch_size=2"),
    *("validate_every=2", "validate_samples=6", "features=pixels@8", "evaluation.metrics=[fid]"),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "own", "name"),
    [
        (MOVING, ("data.held_out_samples=8",), "fid[frames[pixels@8]]"),
        # Its captions are another table than that of the training.
        (EMOJI, ("data.validation=Emoji", "text_encoder.max_length=6"), "fid[pixels@8]"),
    ],
    ids=["text-to-video", "text-to-image"],
)
def test_captions_and_videos_are_measured(
    tmp_path: Path, config: str, own: tuple[str, ...], name: str
) -> None:
    arguments = ("-c", config, "-p", "train", f"experiment_dir={tmp_path}", *NARROW, *SHORT, *own)
    assert main(arguments) == 0
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    (validated,) = (row for row in rows if "val_loss" in row)
    (evaluated,) = (row for row in rows if "evaluation" in row)
    assert len(validated["val_loss_per_bin"]) == 10
    assert validated["val_loss"] > 0
    assert list(evaluated["evaluation"]) == [name]
