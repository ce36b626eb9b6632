"""Runs small enough for a test: digits, a DiT with two narrow blocks, and few sampling steps."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.logging.tracking import read_metrics
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

SMALL = (
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.patch_size=4",
    "data.batch_size=16",
    "log_every=5",
    "ckpt_every=1000",
    "enable_tensorboard_log=false",
    "sampler.num_steps=4",
)

OPTIMIZER_PACKAGES = {
    "AdamW8bit": "bitsandbytes",
    "Prodigy": "prodigyopt",
    "AdamWScheduleFree": "schedulefree",
}


def arguments(folder: Path, **changes: Any) -> list[str]:
    """`key=value` arguments of a small run in `folder`. Write a dot in a key as two underscores."""
    values = {"experiment_dir": str(folder), "max_training_steps": 20, **changes}
    return [*SMALL, *(f"{key.replace('__', '.')}={value}" for key, value in values.items())]


def small_config(folder: Path, phase: str = "train", **changes: Any) -> ExperimentConfig:
    """The config of a small run, checked."""
    return load_config("configs/image/digits/speedit.yaml", phase, arguments(folder, **changes))


def small_trainer(folder: Path, **changes: Any) -> Trainer:
    """A small trainer before its first step."""
    return build_trainer(small_config(folder, **changes))


def stepped(trainer: Trainer, count: int) -> Trainer:
    """The trainer after so many steps more."""
    for _ in range(count):
        trainer.optimizer_step()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """A copy of the model's weights and buffers, by name."""
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def generators(count: int) -> list[torch.Generator]:
    """One for each sample of a batch, with the seeds 0, 1, ..."""
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def need_optimizer(name: str) -> None:
    """Skips the test if the optimizer is not in an installed package, or not in this torch."""
    if name in OPTIMIZER_PACKAGES:
        pytest.importorskip(OPTIMIZER_PACKAGES[name])
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Inside the block, a file cannot grow past `num_bytes`: EFBIG, where a full disk gives ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def last_step(folder: Path) -> int:
    """The last step that the run in `folder` has logged, 0 before the first."""
    rows = read_metrics(folder)
    return rows[-1]["step"] if rows else 0
