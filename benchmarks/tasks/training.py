"""One training of benchmarks/tasks, by the product's own trainer."""

import tempfile
import time
from functools import cache
from pathlib import Path

import torch

from benchmarks.compose.results import Training
from benchmarks.compose.training import built_from, loaded, measured
from benchmarks.tasks.arms import REST, Policy
from benchmarks.tasks.cells import Cell
from benchmarks.tasks.unexplained import unexplained
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.trainer import build
from speedit_plugins.trainer.diffusion.augmentation import NoiseAugmentation
from speedit_plugins.trainer.low_resolution import enlarged, reduced
from speedit_plugins.trainer.training.data_centre import NUM_SAMPLES
from speedit_plugins.trainer.training.validation import training_part


def train(cell: Cell, policy: Policy, seed: int, *, revision: str) -> Training:
    """Trains with a policy and measures on the way. A training that diverges has infinite distances.

    Raises:
        ValueError: this revision cannot build it.
    """
    start = time.perf_counter()
    judge = cell.judge()
    rest_centre = centre_of_rest(cell, seed) if policy.centre == REST else None
    with built_from(cell.config(seed, policy.section(rest_centre))) as (trainer, setup):
        settings = cell.settings
        return cell.training(policy, seed).with_results(
            **measured(
                trainer, settings.steps, judge.names, lambda trained: judge.of(trained, settings.num_samples)
            ),
            setup_seconds=round(setup, 2),
            total_seconds=round(time.perf_counter() - start, 1),
            num_samples=len(trainer.loader.dataset),
            floor=_floor(cell),
            revision=revision,
            centre=trainer.config.diffusion.policy.get("mean"),
        )


def centre_of_rest(cell: Cell, seed: int) -> float:
    """The log-SNR at which half of what the low-resolution input leaves open is explained.

    Raises:
        ValueError: the cell has no low-resolution input.
    """
    if not cell.kind.is_stage:
        raise ValueError(f"{cell} has no low-resolution input; wanted a stage")
    with tempfile.TemporaryDirectory() as folder:
        config = loaded(cell.config(seed, {"type": "uniform"}), Path(folder))
    factor, largest = config.super_resolution.factor, config.super_resolution.augmentation
    augmentation = NoiseAugmentation(build.build_process(config, respaced=False), largest=largest)
    dataset = training_part(config, build.build_dataset(config))
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(dataset), generator=generator)[:NUM_SAMPLES].tolist()
    samples = torch.stack([dataset.load(row, generator)["image"] for row in rows])
    given = enlarged(reduced(samples, factor), factor)
    rest = unexplained(samples, given, augmentation, factor=factor, generator=generator)
    return DataSpectrum.of(rest).log_snr_at()


@cache
def _floor(cell: Cell) -> dict[str, float]:
    found = cell.judge().floor(cell.settings.num_samples)
    return {name: round(distance, 6) for name, distance in found.items()}
