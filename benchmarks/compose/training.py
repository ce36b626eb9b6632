"""One training of benchmarks/compose, by the product's own trainer, config and sample generator.

A seed decides initialisation, data order, noise, and the uniform numbers behind the timesteps. So arms of
one seed share what they can share.

Dims: N samples, C channels, H x W cells.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compose.arms import DEPTH, FLOW, NUM_HEADS, WIDTH, Arm
from benchmarks.compose.results import Training
from benchmarks.compose.sets import NETWORK, ComposeSet, load_compose_set
from benchmarks.image_sets import spread_labels
from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.distances import FeatureStatistics
from speedit_plugins.trainer.parallel.runtime import Runtime, build_device
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.data_centre import centred
from speedit_plugins.trainer.training.products.choice import choose_products
from speedit_plugins.trainer.training.products.timing import fastest_products
from speedit_plugins.trainer.training.trainer import Trainer

# Few-step samplers: with more steps the distances would cost more than the trainings.
SAMPLERS = {FLOW: "euler", "epsilon": "dpm_solver"}
# The choice of a shape is the same for all arms of a process.
_fastest_products = cache(fastest_products)


@dataclass(frozen=True)
class Settings:
    """What all arms share, beside data set and process.

    Args:
        horizon: steps of a training.
        batch_size: samples of a step.
        lr: learning rate of the base, after `warmup_steps`.
        warmup_steps: of the learning rate.
        halflife_steps: of the averaged weights.
        num_samples: N of each distance.
        sampling_steps: model calls for a sample.
        evaluated: shares of the horizon at which distances are measured; the last is 1.
    """

    horizon: int = 800
    batch_size: int = 32
    lr: float = 3e-3
    warmup_steps: int = 20
    halflife_steps: int = 70
    num_samples: int = 500
    sampling_steps: int = 12
    evaluated: tuple[float, ...] = (0.1, 0.2, 0.4, 0.7, 1.0)

    @property
    def steps(self) -> list[int]:
        """The steps at which distances are measured."""
        return list(dict.fromkeys(max(1, round(share * self.horizon)) for share in self.evaluated))


@dataclass(frozen=True)
class Cell:
    """A data set and a process: what is compared is of one cell."""

    data: str
    process: str
    folder: Path
    settings: Settings = Settings()

    def __str__(self) -> str:
        return f"{self.data}, {self.process}"

    def load(self) -> ComposeSet:
        """The data set."""
        return load_compose_set(self.data, self.folder)

    def prepare(self) -> None:
        """Makes the files that the spaces of the data set are kept in."""
        self.load().build_spaces()

    def config(self, arm: Arm, seed: int) -> dict[str, Any]:
        """The keys of an arm's config, all but `experiment_dir`."""
        return arm.config(_base_config(self, seed), self.settings.horizon)

    def training(self, arm: Arm, seed: int) -> Training:
        """What identifies a training, without its results."""
        config = {key: value for key, value in self.config(arm, seed).items() if key != "seed"}
        options = json.loads(json.dumps(asdict(self.settings)))
        return Training(self.data, self.process, arm.name, seed, config, options)


class Judges:
    """Squared Fréchet distances to a data set, in each of its spaces."""

    def __init__(self, data: ComposeSet) -> None:
        self._spaces, self._decode = data.spaces, data.decode
        images = data.decode(data.reference)
        self._real = {name: FeatureStatistics.of(space(images)) for name, space in self._spaces.items()}

    def names(self, *, has_teacher: bool) -> list[str]:
        """The spaces. With `has_teacher` without the ImageNet network: it took part in the training."""
        return [name for name in self._spaces if name != NETWORK or not has_teacher]

    def distances(self, samples: Tensor, *, has_teacher: bool) -> dict[str, float]:
        """Each of `names` -> distance of samples (N, C, H, W); infinite if one is not finite."""
        names = self.names(has_teacher=has_teacher)
        if not samples.isfinite().all():
            return dict.fromkeys(names, float("inf"))
        found, images = {}, self._decode(samples)
        for name in names:
            ours, real = FeatureStatistics.of(self._spaces[name](images)), self._real[name]
            found[name] = ours.frechet_distance(real)
        return found


def train(cell: Cell, arm: Arm, seed: int, *, revision: str) -> Training:
    """Trains an arm and measures its distances on the way.

    A training that diverges has infinite distances from there on.

    Raises:
        ValueError: this revision cannot build the arm.
    """
    start = time.perf_counter()
    data, judges = cell.load(), _judges(cell.data, cell.folder)
    names = judges.names(has_teacher=arm.has_teacher)

    def measure(trainer: Trainer) -> Mapping[str, float]:
        samples = draw(trainer, data, cell.settings.num_samples)
        return judges.distances(samples, has_teacher=arm.has_teacher)

    with built(cell, arm, seed) as (trainer, setup):
        return cell.training(arm, seed).with_results(
            **measured(trainer, cell.settings.steps, names, measure),
            setup_seconds=round(setup, 2),
            total_seconds=round(time.perf_counter() - start, 1),
            num_samples=len(data.images),
            floor=_floor(cell),
            revision=revision,
        )


def measured(
    trainer: Trainer,
    steps: Sequence[int],
    names: Sequence[str],
    measure: Callable[[Trainer], Mapping[str, float]],
) -> dict[str, Any]:
    """Trains up to the last step, and gives what comes out on the way, by fields of `Training`.

    Args:
        trainer: at its first step.
        steps: at which it is measured.
        names: of the measures; all are infinite once the training has diverged.
        measure: measures the trainer; its time does not count.
    """
    watch = Watch()
    curves: dict[str, list[float]] = {name: [] for name in names}
    seconds, cpu_seconds = [], []
    has_diverged = False
    for step in steps:
        with watch:
            has_diverged = has_diverged or not trained_to(trainer, step)
        seconds.append(round(watch.seconds, 2))
        cpu_seconds.append(round(watch.cpu_seconds, 2))
        found = dict.fromkeys(names, float("inf")) if has_diverged else measure(trainer)
        for name, curve in curves.items():
            curve.append(found[name])
    return {
        "steps": steps,
        "distances": curves,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "num_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def check(cell: Cell, arm: Arm) -> None:
    """Nothing if this revision knows the arm's keys; ValueError with the reason otherwise. Builds nothing."""
    with tempfile.TemporaryDirectory() as folder:
        loaded(cell.config(arm, 0), Path(folder))


@contextmanager
def built(cell: Cell, arm: Arm, seed: int) -> Iterator[tuple[Trainer, float]]:
    """The trainer of an arm before its first step, and the seconds that it took to build.

    Its folder is deleted at the end.

    Raises:
        ValueError: this revision cannot build the arm.
    """
    cell.load()
    with built_from(cell.config(arm, seed)) as found:
        yield found


@contextmanager
def built_from(content: Mapping[str, Any]) -> Iterator[tuple[Trainer, float]]:
    """The trainer of a config's keys, all but `experiment_dir`: see `built`."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        config = loaded(content, Path(folder))
        runtime = Runtime(device=build_device(config))
        trainer = build_trainer(centred(config, runtime), runtime)
        choose_products(trainer.model, trainer.config, runtime, measure=_fastest_products)
        trainer.engine.model.train()
        yield trainer, time.perf_counter() - start


def draw(trainer: Trainer, data: ComposeSet, num_samples: int) -> Tensor:
    """Samples (N, C, H, W) of the averaged weights, from the same noise for all arms of a seed."""
    config = trainer.config
    process = build.build_process(config, respaced=False)
    generator = SampleGenerator(trainer.model, process, trainer.inputs.encoder, config)
    labels = None if data.labels is None else spread_labels(data.labels, num_samples)
    parts = generator.draw_batches(
        lambda rows: None if labels is None else labels[rows],
        torch.arange(num_samples),
        weights=trainer.averaged_weights(),
    )
    return torch.cat(list(parts))


def _base_config(cell: Cell, seed: int) -> dict[str, Any]:
    data, settings = cell.load(), cell.settings
    process = {"type": "RectifiedFlow"} if cell.process == FLOW else {"learn_sigma": False}
    return {
        "seed": seed,
        "device": "cpu",
        "num_classes": data.num_classes,
        "image_size": data.images.shape[-1],
        "model": {
            "type": "DiT",
            "patch_size": data.patch_size,
            "hidden_size": WIDTH,
            "depth": DEPTH,
            "num_heads": NUM_HEADS,
            "class_dropout_prob": 0.0,
        },
        "diffusion": {**process, "policy": {"type": "uniform"}},
        "encoder": dict(data.encoder),
        "data": {"dataset": {"type": "GivenTensors", "name": cell.data}, "batch_size": settings.batch_size},
        "optimizer": {"type": "AdamW", "lr": settings.lr, "warmup_steps": settings.warmup_steps},
        "ema": {"halflife_steps": settings.halflife_steps},
        "max_training_steps": settings.horizon,
        "sampler": {
            "type": SAMPLERS[cell.process],
            "num_steps": settings.sampling_steps,
            "clip_sample": data.is_pixels,
        },
        "per_proc_batch_size": 125,
    }


def loaded(content: Mapping[str, Any], folder: Path) -> ExperimentConfig:
    """The config of these keys, with its `experiment_dir` in the folder; ValueError if one is wrong."""
    # JSON is YAML too.
    path = folder / "arm.yaml"
    path.write_text(json.dumps({**content, "experiment_dir": str(folder / "run")}), encoding="utf-8")
    return load_config(path, "train")


def trained_to(trainer: Trainer, step: int) -> bool:
    """Trains up to a step. False if the training diverged before that step."""
    while trainer.step < step:
        try:
            trainer.optimizer_step()
        except ValueError as error:
            if "diverged" not in str(error):
                raise
            return False
    return True


class Watch:
    """A stop-watch: sums the seconds of its blocks, by the wall's clock and by this process's."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start[0]
        self.cpu_seconds += time.process_time() - self._start[1]


@cache
def _judges(name: str, folder: Path) -> Judges:
    return Judges(load_compose_set(name, folder))


@cache
def _floor(cell: Cell) -> dict[str, float]:
    """Distances of as many samples of the data."""
    images = cell.load().images
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    found = _judges(cell.data, cell.folder).distances(
        images[rows[: cell.settings.num_samples]], has_teacher=False
    )
    return {name: round(distance, 5) for name, distance in found.items()}
