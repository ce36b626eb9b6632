"""The metrics of the phase `test`, and how their values are named and printed.

Dims: D features.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from speedit_plugins.trainer.config.sections import EvaluationConfig
from speedit_plugins.trainer.evaluation.collected import Collected, FeatureMoments
from speedit_plugins.trainer.evaluation.distances import frechet_distance, inception_score, kernel_distance
from speedit_plugins.trainer.evaluation.features import FeatureExtractor
from speedit_plugins.trainer.evaluation.neighbors import manifolds
from speedit_plugins.trainer.evaluation.networks import I3d, Inception

CLIP_SCORE = "clip_score"


@dataclass(frozen=True)
class MetricValue:
    """One measured value, and what it was measured on.

    `num_reference` is None without a reference, and also if a reference file does not state the number.
    """

    name: str
    value: float
    features: str
    num_samples: int
    num_reference: int | None = None
    has_reference: bool = False
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """The measured values of a set of samples.

    Args:
        measured: the values.
        samples: where the samples are.
        reference: what they were compared with; None without one.
    """

    measured: Sequence[MetricValue]
    samples: str
    reference: str | None = None


@dataclass(frozen=True)
class Sides:
    """The two sets that metrics compare, and the options of the metrics."""

    samples: Collected
    reference: Collected
    options: EvaluationConfig
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """A new generator with the same seed for each metric, so that metrics do not affect each other."""
        return torch.Generator().manual_seed(self.seed)


# Name, value and further details of each value that a metric yields.
_Measured = Iterator[tuple[str, float, Mapping[str, float]]]


@dataclass(frozen=True)
class Metric:
    """A metric: the field of `Collected` that it uses, and the function that measures it.

    `has_reference` is False if it uses only the samples.
    """

    kind: str
    measure: Callable[[Sides], _Measured]
    has_reference: bool = True


def _fid(sides: Sides) -> _Measured:
    yield "fid", *_frechet(sides.samples.gaussian, sides.reference.gaussian)


def _sfid(sides: Sides) -> _Measured:
    yield "sfid", *_frechet(sides.samples.spatial, sides.reference.spatial)


def _frechet(ours: FeatureMoments | None, theirs: FeatureMoments | None) -> tuple[float, Mapping[str, float]]:
    assert ours is not None
    assert theirs is not None
    distance = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    return distance, {"feature_dim": len(ours.mean)}


def _kid(sides: Sides) -> _Measured:
    ours, theirs = sides.samples.features, sides.reference.features
    assert ours is not None
    assert theirs is not None
    size = min(sides.options.kid_subset_size, len(ours), len(theirs))
    # If a subset is the whole set, all subsets are equal.
    number = 1 if size == len(ours) == len(theirs) else sides.options.kid_subsets
    found = kernel_distance(ours, theirs, num_subsets=number, subset_size=size, generator=sides.generator)
    # One subset has no standard deviation.
    spread = {"std": found.std} if number > 1 else {}
    yield "kid", found.mean, {**spread, "num_subsets": number, "subset_size": size}


def _prdc(sides: Sides) -> _Measured:
    ours, theirs = sides.samples.features, sides.reference.features
    assert ours is not None
    assert theirs is not None
    k, density_k = sides.options.precision_neighbors, sides.options.density_neighbors
    found = manifolds(ours, theirs, precision_neighbors=k, density_neighbors=density_k)
    yield "precision", found.precision, {"num_neighbors": k}
    yield "recall", found.recall, {"num_neighbors": k}
    yield "density", found.density, {"num_neighbors": density_k}
    yield "coverage", found.coverage, {"num_neighbors": density_k}


def _inception_score(sides: Sides) -> _Measured:
    ours, splits = sides.samples.probabilities, sides.options.score_splits
    assert ours is not None
    found = inception_score(ours, num_splits=splits, generator=sides.generator)
    yield "inception_score", found.mean, {"std": found.std, "num_splits": splits}


METRICS = {
    "fid": Metric("gaussian", _fid),
    "sfid": Metric("spatial", _sfid),
    "kid": Metric("features", _kid),
    "prdc": Metric("features", _prdc),
    "inception_score": Metric("probabilities", _inception_score, has_reference=False),
}


def check_numbers(
    metrics: Collection[str], options: EvaluationConfig, *, num_samples: int, num_reference: int | None
) -> None:
    """Checks that the sets have enough images for the metrics and their options.

    Args:
        metrics: names of the metrics.
        options: options of the metrics.
        num_samples: number of samples.
        num_reference: number of reference images; None if none of them is needed.

    Raises:
        ValueError: a set is too small, or an option is too large for the set.
    """
    least, beside = num_samples, f"{num_samples} samples"
    if num_reference is not None:
        least, beside = min(least, num_reference), f"{beside} and a reference of {num_reference}"
    needs_two = [name for name in metrics if METRICS[name].has_reference]
    if needs_two and least < 2:
        raise ValueError(f"{needs_two[0]} needs at least two images in each set, got one")
    limits = [("score_splits", "inception_score", num_samples)]
    if num_reference is not None:
        limits += [
            ("precision_neighbors", "prdc", least - 1),
            ("density_neighbors", "prdc", num_reference - 1),
        ]
    for key, metric, most in limits:
        if metric in metrics and getattr(options, key) > most:
            raise ValueError(
                f"evaluation.{key} must be at most {most} for {beside}, got {getattr(options, key)}"
            )


def label_of(metric: str, extractor: FeatureExtractor) -> str:
    """The reported name of a metric: with its features, such as fid[pixels@8].

    With the network that a metric is defined on, the name is plain: fid with Inception, fvd with I3D.
    """
    if isinstance(extractor, Inception):
        return metric
    if isinstance(extractor, I3d) and metric == "fid":
        return "fvd"
    return f"{metric}[{extractor.name}]"


def line_of(metric: MetricValue) -> str:
    """A line to print: value, features and sizes of the sets, with a warning if they are small."""
    spread = f" ± {metric.details['std']:.4f}" if "std" in metric.details else ""
    numbers = f"{metric.num_samples} samples"
    if metric.has_reference:
        numbers += (
            f", {'unstated number of' if metric.num_reference is None else metric.num_reference} reference"
        )
    # The bias of a Fréchet distance falls with the samples per dimension; ten is a common minimum.
    dim = metric.details.get("feature_dim", 0)
    least = min(metric.num_samples, metric.num_reference or metric.num_samples)
    few = f"; few for {dim} dimensions: biased upwards" if least < 10 * dim else ""
    return f"{metric.name}: {metric.value:.4f}{spread}  (features {metric.features}; {numbers}{few})"
