"""Runs that are killed between two checkpoints end as if nothing had happened."""

import signal
import sys
from pathlib import Path

import pytest
from processes import Job
from runs import last_step

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints

FEW = (
    *("max_training_steps=12", "ckpt_every=4", "log_every=1", "data.batch_size=4", "data.num_workers=0"),
    *("optimizer.warmup_steps=0", "optimizer.schedule=constant", "validate_every=0", "data.validation=null"),
    *("enable_tensorboard_log=false", "model.depth=2", "model.num_heads=2", "model.hidden_size=24"),
)
CLOUDS = ("num_points=40", "model.window_size=2", "model.window_blocks=[0]")
TASKS = {
    "voxels": ("configs/shapes/digits.yaml", ("voxel_size=8",)),
    "points": ("configs/shapes/digits_points.yaml", ("voxel_size=8", *CLOUDS)),
    "hole": ("configs/shapes/digits.yaml", ("voxel_size=8", "inpainting=RandomMasks")),
    "super-resolution": ("configs/image/digits/speedit.yaml", ("super_resolution.factor=2",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_bit_for_bit(tmp_path: Path, task: str) -> None:
    config, own = TASKS[task]

    def options(folder: Path) -> list[str]:
        return ["-c", config, "-p", "train", f"experiment_dir={folder}", *FEW, *own]

    parts, whole = tmp_path / "parts", tmp_path / "whole"
    with Job([sys.executable, "tools/main.py", *options(parts), "max_training_steps=100000"]) as job:
        job.until(lambda: last_step(parts) >= 6)
        job.process.send_signal(signal.SIGKILL)
        job.end()
    saved = checkpoints.newest_whole(checkpoints.newest_first(parts / "checkpoints"))
    assert saved is not None
    # As if the machine had ended it there: a fast one may have gone further.
    end = f"max_training_steps={checkpoints.step_of(saved) + 3}"
    for folder in (parts, whole):
        assert main([*options(folder), end]) == 0
    name = f"step_{checkpoints.step_of(saved) + 3:07d}"
    for file in (checkpoints.MODEL, checkpoints.EMA):
        found, expected = (folder / "checkpoints" / name / file for folder in (parts, whole))
        assert found.read_bytes() == expected.read_bytes()
