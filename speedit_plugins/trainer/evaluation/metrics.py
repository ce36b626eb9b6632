"""The figures of the phase test: metrics by name, and how a figure is called and said.

Dims: D features.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from speedit_plugins.trainer.config.schema import EvaluationConfig
from speedit_plugins.trainer.evaluation.collected import Collected, FeatureMoments
from speedit_plugins.trainer.evaluation.distances import frechet_distance, inception_score, kernel_distance
from speedit_plugins.trainer.evaluation.features import FeatureExtractor
from speedit_plugins.trainer.evaluation.neighbors import manifolds
from speedit_plugins.trainer.evaluation.networks import I3d, Inception

CLIP_SCORE = "clip_score"


@dataclass(frozen=True)
class Figure:
    """A number, and what it was made from; `num_reference` is None too where a file does not state it."""

    name: str
    value: float
    features: str
    num_samples: int
    num_reference: int | None = None
    has_reference: bool = False
    details: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sides:
    """What metrics compare, and their options."""

    samples: Collected
    reference: Collected
    options: EvaluationConfig
    seed: int

    @property
    def generator(self) -> torch.Generator:
        """The same for each metric, whichever others there are."""
        return torch.Generator().manual_seed(self.seed)


# A label, a value, and what else a metric says.
_Measured = Iterator[tuple[str, float, Mapping[str, float]]]


@dataclass(frozen=True)
class Metric:
    """The field of `Collected` that it reads, of both sides or of the samples alone, and its figures."""

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
    # Of whole sets every subset is the same.
    number = 1 if size == len(ours) == len(theirs) else sides.options.kid_subsets
    found = kernel_distance(ours, theirs, num_subsets=number, subset_size=size, generator=sides.generator)
    # One subset has no deviation.
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
METRIC_OF = {
    "kid_subsets": "kid",
    "kid_subset_size": "kid",
    "precision_neighbors": "prdc",
    "density_neighbors": "prdc",
    "score_splits": "inception_score",
    "clip": CLIP_SCORE,
}


def check_numbers(
    metrics: Collection[str], options: EvaluationConfig, *, num_samples: int, num_reference: int | None
) -> None:
    """Returns where sets of these sizes have enough images for the metrics, before any is read.

    Args:
        num_reference: None where no image of the reference is read.

    Raises:
        ValueError: a set or an option that is too small or too large for the other.
    """
    least, beside = num_samples, f"{num_samples} samples"
    if num_reference is not None:
        least, beside = min(least, num_reference), f"{beside} and a reference of {num_reference}"
    needs_two = [name for name in metrics if METRICS[name].has_reference]
    if needs_two and least < 2:
        raise ValueError(f"{needs_two[0]} needs two images or more of a set, got one")
    limits = [("score_splits", "inception_score", num_samples)]
    if num_reference is not None:
        limits += [
            ("precision_neighbors", "prdc", least - 1),
            ("density_neighbors", "prdc", num_reference - 1),
        ]
    for key, metric, most in limits:
        if metric in metrics and getattr(options, key) > most:
            raise ValueError(
                f"evaluation.{key} needs to be at most {most} for {beside}, got {getattr(options, key)}"
            )


def label_of(metric: str, extractor: FeatureExtractor) -> str:
    """Plain where the network is the one that the name stands for, else with the features: fid[pixels@8]."""
    if isinstance(extractor, Inception):
        return metric
    if isinstance(extractor, I3d) and metric == "fid":
        return "fvd"
    return f"{metric}[{extractor.name}]"


def line_of(figure: Figure) -> str:
    """A figure as a person reads it, with its numbers, and a warning where they are small."""
    spread = f" ± {figure.details['std']:.4f}" if "std" in figure.details else ""
    numbers = f"{figure.num_samples} samples"
    if figure.has_reference:
        numbers += (
            f", {'unstated number of' if figure.num_reference is None else figure.num_reference} reference"
        )
    # The bias of a Fréchet distance falls with the number of samples per dimension; ten is a usual least.
    dim = figure.details.get("feature_dim", 0)
    least = min(figure.num_samples, figure.num_reference or figure.num_samples)
    few = f"; few for {dim} dimensions: biased upwards" if least < 10 * dim else ""
    return f"{figure.name}: {figure.value:.4f}{spread}  (features {figure.features}; {numbers}{few})"
