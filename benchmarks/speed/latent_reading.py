"""Time to get a training batch's latents: read from a cache, or decode and encode the images each time.

The encoder has the architecture of Stable Diffusion's. Its weights are random: they cost the same.
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.speed.wrapper_overhead import Timings, interleaved
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.training.assembly import build_trainer

# Channels of its levels. Source: Rombach et al. 2022, arXiv:2112.10752, and the config of sd-vae-ft.
SD_CHANNELS = (128, 256, 512, 512)


@dataclass(frozen=True)
class Reading:
    """Seconds of a batch from images (`host` of the timings) and from the cache (`ours`)."""

    image_size: int
    batch: int
    timings: Timings


def measure(*, image_size: int, batch: int, rounds: int, channels: Sequence[int] = SD_CHANNELS) -> Reading:
    """Times batches of our loader and encoder, both ways in turn. The first round is not counted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = _experiment(folder, image_size=image_size, batch=batch, channels=channels)
        config = load_config(path, "train")
        _tool().cache(
            config, folder / "latents", shard_size=2 * batch, batch_size=batch, dtype="float16", flip=False
        )
        cached = [f"data.dataset.root={folder / 'latents'}", "data.dataset.type=LatentCache"]
        sides = [_batches(config), _batches(load_config(path, "train", cached))]
        timings = interleaved(*sides, rounds)
        images, latents = (side().cpu() for side in sides)
        # Both are latents of the same batch. The cache keeps means and standard deviations in float16.
        torch.testing.assert_close(latents, images, atol=2e-3 * float(images.abs().max()), rtol=0)
        return Reading(image_size, batch, timings)


def _batches(config: ExperimentConfig) -> Callable[[], Tensor]:
    """A function that makes a batch of latents (B, C, h, w) as the trainer does."""
    trainer = build_trainer(config)

    def step() -> Tensor:
        return trainer.inputs.encode(next(trainer.loader), trainer.draws.generators).latents

    return step


def _experiment(folder: Path, *, image_size: int, batch: int, channels: Sequence[int]) -> Path:
    """Writes a config with such an encoder, and a folder with two batches of random images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder / "autoencoder")
    pixels = np.random.default_rng(0).integers(0, 256, (2 * batch, image_size, image_size, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = folder / "images" / "class" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    content = {
        "experiment_dir": str(folder / "run"),
        "num_classes": 1,
        "image_size": image_size,
        "model": {"type": "DiT-S/2"},
        "encoder": {"type": "AutoencoderKL", "path": str(folder / "autoencoder")},
        "data": {
            "dataset": {"type": "ImageFolder", "root": str(folder / "images"), "random_flip": False},
            "batch_size": batch,
        },
        "max_training_steps": 1,
        "sample_every": 0,
        "device": "cpu",
    }
    path = folder / "experiment.yaml"
    path.write_text(json.dumps(content))
    return path


def _tool() -> ModuleType:
    """The module `tools/cache_latents.py`."""
    path = Path(__file__).parents[2] / "tools" / "cache_latents.py"
    spec = importlib.util.spec_from_file_location("cache_latents", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # `dataclass` looks the module up in `sys.modules`.
    sys.modules["cache_latents"] = module
    spec.loader.exec_module(module)
    return module
