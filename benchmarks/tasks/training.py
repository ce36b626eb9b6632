"""One training of benchmarks/tasks, by the product's own trainer."""

import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.compose.results import Training
from benchmarks.compose.training import Watch, built_from, loaded, trained_to
from benchmarks.tasks.arms import DATA, Policy
from benchmarks.tasks.cells import Cell
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.data_centre import centred


def train(cell: Cell, policy: Policy, seed: int, *, revision: str) -> Training:
    """Trains with a policy and measures on the way. A training that diverges has infinite distances.

    Raises:
        ValueError: this revision cannot build it.
    """
    start = time.perf_counter()
    judge = cell.judge()
    data_centre = centre_of_data(cell, seed) if policy.centre == DATA else None
    with built_from(cell.config(seed, policy.section(data_centre))) as (trainer, setup):
        watch, settings = Watch(), cell.settings
        curves: dict[str, list[float]] = {name: [] for name in judge.names}
        seconds, cpu_seconds = [], []
        has_diverged = False
        for step in settings.steps:
            with watch:
                has_diverged = has_diverged or not trained_to(trainer, step)
            seconds.append(round(watch.seconds, 2))
            cpu_seconds.append(round(watch.cpu_seconds, 2))
            found = {} if has_diverged else judge.of(trainer, settings.num_samples)
            for name, curve in curves.items():
                curve.append(found.get(name, float("inf")))
        return cell.training(policy, seed).with_results(
            steps=settings.steps,
            distances=curves,
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            setup_seconds=round(setup, 2),
            total_seconds=round(time.perf_counter() - start, 1),
            num_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            num_samples=len(trainer.loader.dataset),
            floor=_floor(cell),
            revision=revision,
            centre=trainer.config.diffusion.policy.get("mean"),
        )


def centre_of_data(cell: Cell, seed: int) -> float:
    """The log-SNR at which half of the data's variance is explained, whatever the model is given."""
    content: dict[str, Any] = cell.config(seed, {"type": "spectral"})
    content.pop("super_resolution", None)
    with tempfile.TemporaryDirectory() as folder:
        config = centred(loaded(content, Path(folder)), Runtime(device=torch.device("cpu")))
    return float(config.diffusion.policy["mean"])


@cache
def _floor(cell: Cell) -> dict[str, float]:
    found = cell.judge().floor(cell.settings.num_samples)
    return {name: round(distance, 6) for name, distance in found.items()}
