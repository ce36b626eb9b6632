"""Cascades small enough for a test: three stages of digits, and two of captioned emoji."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import arguments

from speedit_plugins.cli import main

DIGITS, EMOJI = "configs/image/digits/speedit.yaml", "configs/text_to_image/emoji.yaml"
# Each stage has its own process, sampler and guidance.
STAGES: tuple[dict[str, Any], ...] = (
    {"image_size": 8, "sampler__num_steps": 3, "guidance_scale": 2.0},
    {
        "image_size": 16,
        "super_resolution__factor": 2,
        "diffusion": "{type: RectifiedFlow, shift: 2.0, policy: auto}",
        "sampler": "{type: euler, num_steps: 2, clip_sample: true}",
        "guidance_scale": 1.0,
    },
    {
        "image_size": 32,
        "super_resolution__factor": 2,
        "diffusion__noise_schedule": "cosine",
        "sampler__augmentation": 0.1,
        "guidance_scale": 1.5,
    },
)


def options_of(folder: Path, **changes: Any) -> list[str]:
    """The config and `key=value` arguments of a stage in a folder; see `runs.arguments`."""
    return ["-c", DIGITS, *arguments(folder, **{"max_training_steps": 2, **changes})]


def train_stages(factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of three trained stages, of 8, 16 and 32 pixels."""
    folders = [factory.mktemp(f"stage_{number}") for number in range(len(STAGES))]
    for folder, stage in zip(folders, STAGES, strict=True):
        assert main([*options_of(folder, **stage), "-p", "train"]) == 0
    return folders


def train_captioned(folder: Path, options: Sequence[str]) -> list[str]:
    """Trains emoji of 16 pixels in folder/base, and a stage to 32 in folder/top.

    Args:
        folder: of both runs.
        options: of both; they give the text encoder and its width.

    Returns:
        The arguments that draw with the cascade.
    """
    tiny = [
        *("model.hidden_size=16", "model.depth=1", "model.num_heads=2", "model.text_hidden=16"),
        *("max_training_steps=2", "data.batch_size=2", "log_every=2", "enable_tensorboard_log=false"),
        *("optimizer.warmup_steps=0", "sampler.num_steps=2", "model.draft=false"),
    ]
    sizes = [f"{key}=16" for key in ("image_size", "data.dataset.image_size", "model.input_size")]
    both = ["-c", EMOJI, *tiny, *options]
    top = [*both, f"experiment_dir={folder / 'top'}", "super_resolution.factor=2"]
    assert main([*both, f"experiment_dir={folder / 'base'}", *sizes, "-p", "train"]) == 0
    assert main([*top, "-p", "train"]) == 0
    return [*top, f"cascade=[{folder / 'base'}]"]
