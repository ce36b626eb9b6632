"""Evaluation in training: draws a small set of samples and measures it, as the phase test would.

Dims: N samples, B of them in a batch, F frames (absent for images), H x W pixels, C channels.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.metrics import MetricValue
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.logging.tracking import EVALUATION
from speedit_plugins.trainer.models.interface import input_shape
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.sampling.conditions import Conditions, random_rows, repeats
from speedit_plugins.trainer.sampling.evaluate import check_metrics
from speedit_plugins.trainer.sampling.files.sample_sets import ItemSet
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.scores.comparison import Comparison
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.periodic import Measured, Snapshot


class Evaluation:
    """Draws the same `evaluate_samples` conditions from the same noise each time, with the averaged weights.

    Each rank draws some of the batches. Rank 0 measures them; it computes what it needs of the reference
    once, when it is made, and keeps it in the experiment's folder.

    Args:
        generator: draws samples.
        conditions: all classes, or the prompts.
        config: gives `evaluate_samples`, the reference, the features and the metrics.
        runtime: the ranks that draw.

    Raises:
        ValueError: see `Comparison`.
    """

    def __init__(
        self, generator: SampleGenerator, conditions: Conditions, config: ExperimentConfig, runtime: Runtime
    ) -> None:
        check_metrics(config.evaluation)
        self._generator, self._conditions, self._runtime = generator, conditions, runtime
        self._rows = random_rows(conditions, config.evaluate_samples, seed=config.seed)
        self._batch_size = config.per_proc_batch_size
        if runtime.is_main and (line := repeats(conditions, config.evaluate_samples)) is not None:
            say(f"evaluation: {line}")
        self._comparison, fault = None, None
        try:
            if runtime.is_main:
                self._comparison = self._compared(config)
        # The others wait for the reference.
        except (ValueError, OSError, MemoryError) as error:
            fault = error
        runtime.raise_together(fault)

    def __call__(self, snapshot: Snapshot) -> Measured:
        """The figures by name, of rank 0. Collective."""
        drawn, is_finite = self._draw(snapshot)
        if self._comparison is None:
            return Measured()
        if not is_finite:
            say(f"step {snapshot.step}: samples are not finite, so they are not evaluated")
            return Measured()
        found = self._comparison.measure(_as_set(len(drawn), lambda index: drawn[index], drawn.ndim == 5))
        figures = {metric.name: metric.value for metric in found}
        say(f"step {snapshot.step}: {', '.join(f'{name} {value:.4f}' for name, value in figures.items())}")
        row = {EVALUATION: figures, "evaluation_samples": len(drawn)}
        return Measured(row, scores=_scores(found))

    def _draw(self, snapshot: Snapshot) -> tuple[Tensor, bool]:
        """The samples on rank 0, uint8 (N, [F,] H, W, C) in the order of their conditions.

        The second value tells whether those of all ranks are finite.
        """
        is_finite = True
        runtime, size = self._runtime, self._batch_size
        weights = snapshot.everywhere
        starts = list(range(0, len(self._rows), size))
        # All ranks have as many places for batches; the last ones may stay empty.
        places = torch.zeros(-(-len(starts) // runtime.world_size), size, *self._shape(), dtype=torch.uint8)
        for place, start in zip(places, starts[runtime.rank :: runtime.world_size], strict=False):
            rows = self._rows[start : start + size]
            condition = self._conditions.of(rows, self._generator.device)
            samples = self._generator.draw(condition, len(rows), weights=weights, stream=start)
            is_finite &= bool(samples.isfinite().all())
            place[: len(rows)] = torch.from_numpy(images.to_uint8(samples))
        parts = runtime.gather(places)
        is_finite = runtime.maximum([float(not is_finite)]) == [0.0]
        if not parts:
            return places, is_finite
        return torch.stack(parts, dim=1).flatten(0, 2)[: len(self._rows)], is_finite

    def _shape(self) -> tuple[int, ...]:
        """Shape of a sample, ([F,] H, W, C)."""
        encoder = self._generator.encoder
        _, *frames, height, width = input_shape(self._generator.model)
        sides = (height * encoder.downsample, width * encoder.downsample)
        return (*frames, *sides, encoder.image_channels)

    def _compared(self, config: ExperimentConfig) -> Comparison:
        folder = Path(config.experiment_dir)
        folder.mkdir(parents=True, exist_ok=True)
        return Comparison(config, self._example(config), config.evaluation.metrics, keep_in=folder)

    def _example(self, config: ExperimentConfig) -> ItemSet:
        blank = torch.zeros(self._shape(), dtype=torch.uint8)
        return _as_set(config.evaluate_samples, lambda index: blank, config.num_frames > 0)


def _as_set(num_samples: int, read: Callable[[int], Tensor], is_video: bool) -> ItemSet:
    return ItemSet("the samples of the training", num_samples, read, is_video=is_video)


def _scores(found: list[MetricValue]) -> dict[str, float]:
    """The distances under the names that `keep_best` takes."""
    known = {"fid": "fid", "fvd": "fid", "kid": "kid"}
    named = {metric.name.partition("[")[0]: metric.value for metric in found}
    return {known[name]: value for name, value in named.items() if name in known}
