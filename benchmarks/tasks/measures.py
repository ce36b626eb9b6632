"""What benchmarks/tasks measures of a model in training. Smaller is better, and all are above 0.

Dims: N samples, C channels, H x W pixels.
"""

from collections.abc import Callable, Mapping
from typing import Protocol, cast

import torch
from torch import Tensor

from benchmarks.flow.spaces import Space
from benchmarks.image_sets import spread_labels
from speedit_plugins.trainer import build
from speedit_plugins.trainer.evaluation.distances import FeatureStatistics
from speedit_plugins.trainer.evaluation.shapes import shape_scores
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import (
    LowResolutionInputs,
    given_conditions,
)
from speedit_plugins.trainer.training.trainer import Trainer

Measures = dict[str, float]


class Judge(Protocol):
    """Measures what a trainer's averaged weights draw. The noise is the same for all policies of a seed."""

    names: tuple[str, ...]

    def of(self, trainer: Trainer, num_samples: int) -> Measures: ...
    def floor(self, num_samples: int) -> Measures: ...


class Sets:
    """Distances between as many samples and samples of the data, as sets.

    Args:
        distances: name -> distance of samples from samples of the data.
        data: samples of the data, (M, ...).
        labels: int64, of the data; drawn in their proportions. None for an unconditional model.
    """

    def __init__(
        self,
        distances: Mapping[str, Callable[[Tensor], float]],
        data: Tensor,
        labels: Tensor | None = None,
    ) -> None:
        self._distances, self._data, self._labels = distances, data, labels
        self.names = tuple(distances)

    def of(self, trainer: Trainer, num_samples: int) -> Measures:
        """Each distance of samples that are drawn; infinite if one is not finite."""
        labels = None if self._labels is None else spread_labels(self._labels, num_samples)
        samples = drawn(trainer, Conditions(labels=labels), num_samples)
        if not samples.isfinite().all():
            return dict.fromkeys(self.names, float("inf"))
        return {name: distance(samples) for name, distance in self._distances.items()}

    def floor(self, num_samples: int) -> Measures:
        """Distances of as many samples of the data."""
        rows = torch.randperm(len(self._data), generator=torch.Generator().manual_seed(0))[:num_samples]
        return {name: distance(self._data[rows]) for name, distance in self._distances.items()}


class Enlargements:
    """What a super-resolution model makes of low-resolution samples that it has not seen, and the originals.

    `mse` is the mean squared difference of pixels. Each space also gives NAME, the squared Fréchet distance
    of the set from that of the originals, and NAME_each, the mean squared distance of features from those of
    the original, as a share of what it is between two different originals.

    Args:
        spaces: name -> feature space.
    """

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        self._spaces = spaces
        self._originals: Tensor | None = None
        self._features: dict[str, Tensor] = {}
        self.names = ("mse", *(f"{name}{kind}" for name in spaces for kind in ("_each", "")))

    def of(self, trainer: Trainer, num_samples: int) -> Measures:
        """The measures of `num_samples` enlargements, or of those that are held out if they are fewer."""
        conditions = given_conditions(trainer.config, _generator(trainer), None, num_samples=num_samples)
        inputs = cast(LowResolutionInputs, conditions.inputs)
        number = len(inputs)
        samples = drawn(trainer, conditions, number)
        if not samples.isfinite().all():
            return dict.fromkeys(self.names, float("inf"))
        originals = inputs.samples.originals(torch.arange(number))
        assert originals is not None
        return self.between(samples, originals)

    def between(self, samples: Tensor, originals: Tensor) -> Measures:
        """The measures of samples and their originals, each (N, C, H, W)."""
        if self._originals is None or not torch.equal(self._originals, originals):
            # They are the same all through a seed.
            self._originals = originals
            self._features = {name: space(originals).double() for name, space in self._spaces.items()}
        found = {"mse": float((samples - originals).square().mean())}
        for name, space in self._spaces.items():
            ours, real = space(samples).double(), self._features[name]
            # Two different originals are twice their variance apart.
            unlike = 2 * real.var(dim=0).sum()
            found[f"{name}_each"] = float((ours - real).square().sum(dim=1).mean() / unlike)
            found[name] = FeatureStatistics.of(ours).frechet_distance(FeatureStatistics.of(real))
        return found

    def floor(self, num_samples: int) -> Measures:
        """0 for all: the originals themselves."""
        return dict.fromkeys(self.names, 0.0)


def drawn(trainer: Trainer, conditions: Conditions, num_samples: int) -> Tensor:
    """Samples (N, ...) of the averaged weights at the first N conditions, in the units of the model."""
    device = next(trainer.model.parameters()).device
    parts = _generator(trainer).draw_batches(
        lambda rows: conditions.of(rows, device),
        torch.arange(num_samples),
        weights=trainer.averaged_weights(),
    )
    return torch.cat(list(parts)).cpu()


def frechet_to(space: Callable[[Tensor], Tensor], data: Tensor) -> Callable[[Tensor], float]:
    """The squared Fréchet distance of samples from data, in a space of features."""
    real = FeatureStatistics.of(space(data))
    return lambda samples: FeatureStatistics.of(space(samples)).frechet_distance(real)


def chamfer_to(data: Tensor) -> Callable[[Tensor], float]:
    """The minimum matching distance, by Chamfer's, of clouds from as many clouds (N, 3, P) of the data."""
    return lambda samples: shape_scores(samples, data[: len(samples)]).mmd


def _generator(trainer: Trainer) -> SampleGenerator:
    process = build.build_process(trainer.config, respaced=False)
    return SampleGenerator(trainer.model, process, trainer.inputs.encoder, trainer.config)
