"""The phase `test` for shapes: how near the samples are to shapes that were not trained on.

Solids are compared by points on their surface. Everything is in the units of the data.

Dims: M shapes of each set, C channels, N points, D x H x W voxels.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer import build, results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import METRIC_OF, EvaluationConfig
from speedit_plugins.trainer.data.held_out import hold_out
from speedit_plugins.trainer.data.loader import DATA_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.data.shapes.folder import ShapeFolder
from speedit_plugins.trainer.data.shapes.voxel_surface import surface_of_voxels
from speedit_plugins.trainer.evaluation.metrics import Figures, MetricValue
from speedit_plugins.trainer.evaluation.shape_classifier import ShapeClassifier, frechet_shape_distance
from speedit_plugins.trainer.evaluation.shapes import (
    DISTANCES,
    MAX_MATCHED_POINTS,
    earth_mover_distances,
    shape_scores,
)
from speedit_plugins.trainer.layouts import POINTS, layout_of
from speedit_plugins.trainer.sampling.files.shape_files import read_shapes
from speedit_plugins.trainer.terminal import progress, say

FRECHET = "frechet"
METRICS = (*DISTANCES, FRECHET)
DEFAULT = "chamfer"
"""What is measured where the config has the metrics of images, the default of `evaluation.metrics`."""
# Shapes of the training that the classifier of `frechet` learns from, at most.
NUM_LEARNED = 2000


def measure_shapes(config: ExperimentConfig) -> Iterator[Figures]:
    """MMD, coverage and 1-NN accuracy by each distance of `evaluation.metrics`, and the Fréchet distance.

    The measures need two sets of one size: of the larger one, shapes are left out, and a line says so.

    Yields:
        What is measured so far, after each metric: some take minutes, and others hours.

    Args:
        config: gives the metrics, the samples, and the reference: `reference`, or else `data.validation`, or
            else what `data.held_out_samples` keeps out of the training.

    Raises:
        ValueError: a metric is unknown, an option has no effect, there is no reference, or a set cannot be
            read or has another kind of shapes.
    """
    names = _metrics(config)
    folder = results.newest_samples(config) if config.samples is None else Path(config.samples)
    drawn = read_shapes(folder)
    _check_samples(config, names, drawn, folder)
    dataset, source = _reference(config)
    number = min(len(drawn), len(dataset))
    if number < 2:
        raise ValueError(
            f"test of shapes needs at least 2 of each set, got {len(drawn)} in samples, {folder}, and"
            f" {len(dataset)} in the reference, {source}"
        )
    if len(drawn) != len(dataset):
        say(f"comparing {number} of {len(drawn)} samples and {number} of {len(dataset)} reference shapes")
    generator = torch.Generator().manual_seed(stream_seed(config.seed, DATA_STREAM, 1))
    chosen = torch.randperm(len(dataset), generator=generator)[:number].sort().values
    reference = torch.stack([_labelled(config, dataset, int(index))[0] for index in chosen])
    ours = _clouds(drawn[:number], generator, "samples")
    theirs = _clouds(reference, generator, "reference shapes")
    measured: list[MetricValue] = []
    for name in names:
        if name == FRECHET:
            measured.append(_frechet(config, drawn[:number], reference))
        else:
            measured += _by_distance(name, ours, theirs)
        yield Figures(tuple(measured), str(folder), source)


def _by_distance(name: str, ours: Tensor, theirs: Tensor) -> list[MetricValue]:
    """MMD, coverage and 1-NN accuracy of clouds (M, 3, N)."""
    number = len(ours)
    total = _num_searches(name, number)
    if name == "earth_mover":
        start = perf_counter()
        earth_mover_distances(ours[:1], theirs[:1])
        seconds = (perf_counter() - start) * total
        say(
            f"{name} matches {total:,} pairs of clouds of {ours.shape[2]:,} points: about {_spoken(seconds)},"
            " as the first one took. Fewer samples take less, with the square of their number"
        )
    with progress(name, total=total, unit="search") as bar:
        scores = shape_scores(ours, theirs, distance=name, progress=bar.update)
    what = f"{ours.shape[2]} points"
    return [
        MetricValue(f"{label}[{name}]", getattr(scores, label), what, number, number, has_reference=True)
        for label in ("mmd", "coverage", "one_nn_accuracy")
    ]


def _spoken(seconds: float) -> str:
    """A duration in a unit in which it is at least 1."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(1, round(seconds))} seconds"


def _frechet(config: ExperimentConfig, samples: Tensor, reference: Tensor) -> MetricValue:
    """The Fréchet distance in features of a classifier that learns from the training's shapes."""
    dataset = build.build_dataset(config, augmented=False)
    if config.data.held_out_samples:
        dataset = hold_out(dataset, config.data.held_out_samples, seed=config.seed)[0]
    generator = torch.Generator().manual_seed(stream_seed(config.seed, DATA_STREAM, 2))
    chosen = torch.randperm(len(dataset), generator=generator)[:NUM_LEARNED].tolist()
    pairs = [_labelled(config, dataset, index) for index in chosen]
    shapes, labels = torch.stack([shape for shape, _ in pairs]), torch.tensor([label for _, label in pairs])
    classifier = ShapeClassifier(shapes, labels, seed=config.seed)
    say(f"the classifier of {FRECHET} is right on {classifier.accuracy:.1%} of shapes that it has not seen")
    # Without a look at a shape, the most frequent class is right on this share.
    chance = float(labels.bincount().max()) / len(labels)
    if classifier.accuracy <= chance:
        say(
            f"warning: a guess is right on {chance:.1%}, so {FRECHET} has features of a classifier that has"
            f" not learned from the {len(shapes)} shapes of the training: its figure says little"
        )
    distance = frechet_shape_distance(classifier, samples, reference)
    number = len(samples)
    what = f"a classifier of {len(shapes)} shapes, right on {classifier.accuracy:.1%} of others"
    return MetricValue(FRECHET, distance, what, number, number, True, {"accuracy": classifier.accuracy})


def _metrics(config: ExperimentConfig) -> list[str]:
    """The metrics of shapes to measure; refuses others, and options of other metrics."""
    options, defaults = config.evaluation, EvaluationConfig()
    known, names = ", ".join(METRICS), options.metrics
    if names == defaults.metrics:
        say(f"evaluation.metrics is not set; shapes are measured by {DEFAULT}. Known: {known}")
        names = [DEFAULT]
    if FRECHET in names and not config.num_classes:
        raise ValueError(f"{FRECHET} learns the classes of the training's shapes: wanted num_classes above 0")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r} of shapes in evaluation.metrics; known: {known}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"evaluation.metrics needs each metric once, at least one of {known}, got {names}")
    for key in (*METRIC_OF, "reference_statistics"):
        if getattr(options, key) != getattr(defaults, key):
            raise ValueError(f"evaluation.{key} has no effect on {', '.join(names)}")
    return names


def _check_samples(config: ExperimentConfig, names: list[str], drawn: Tensor, folder: Path) -> None:
    """Refuses samples that are other shapes than the experiment's, or that a metric cannot take."""
    is_cloud, found = layout_of(config) == POINTS, tuple(drawn.shape[1:])
    if drawn.ndim != (3 if is_cloud else 5):
        raise ValueError(f"samples: {folder} has shapes {found}, not {layout_of(config)}")
    if not is_cloud and found != (1, *(config.voxel_size,) * 3):
        sides = " x ".join(map(str, found[1:]))
        raise ValueError(f"samples: {folder} has {sides} voxels; wanted voxel_size: {config.voxel_size}")
    number = found[1]
    if is_cloud and "earth_mover" in names and not number == config.num_points <= MAX_MATCHED_POINTS:
        raise ValueError(
            f"earth_mover matches clouds with the same number of points, at most {MAX_MATCHED_POINTS}, got"
            f" {number} in samples, {folder}, and num_points: {config.num_points}"
        )


def _num_searches(name: str, number: int) -> int:
    """How often a distance reports progress while the three tables of `number` shapes are measured."""
    return 4 * number if name == "chamfer" else number * (2 * number - 1)


def _reference(config: ExperimentConfig) -> tuple[SampleSource, str]:
    if config.reference is not None:
        sizes: dict[str, Any] = {"voxel_size": config.voxel_size}
        if config.num_points:
            # In the units of the samples, those of the data.
            sizes = {"num_points": config.num_points, "fit_box": False}
        return ShapeFolder(config.reference, class_cond=False, **sizes), config.reference
    if config.data.validation is not None:
        data = replace(config.data, dataset=config.data.validation, validation=None)
        return build.build_dataset(replace(config, data=data), augmented=False), "data.validation"
    if config.data.held_out_samples:
        whole = build.build_dataset(config, augmented=False)
        return hold_out(whole, config.data.held_out_samples, seed=config.seed)[1], "data.held_out_samples"
    raise ValueError(
        "test of shapes compares with shapes that were not trained on: wanted reference, data.validation or"
        " data.held_out_samples"
    )


def _labelled(config: ExperimentConfig, dataset: SampleSource, index: int) -> tuple[Tensor, int]:
    """A shape in the units of the data, and its label; 0 without one."""
    generator = torch.Generator().manual_seed(stream_seed(config.seed, DATA_STREAM, 0, index))
    sample = dataset.load(index, generator)
    shape: Tensor = sample[layout_of(config)]
    normalization = getattr(dataset, "normalization", None)
    shape = shape if normalization is None else normalization.invert(shape)
    return shape, int(sample.get("label", 0))


def _clouds(shapes: Tensor, generator: torch.Generator, name: str, *, num_points: int = 1024) -> Tensor:
    """Clouds as they are, and points on the surface of solids, (M, 3, N).

    An empty solid counts as a cloud at the centre of the cube. Leaving it out would raise the scores.
    """
    if shapes.ndim == 3:
        return shapes
    is_full = (shapes > 0).flatten(1).any(dim=1)
    if not is_full.all():
        say(f"warning: {int((~is_full).sum())} of {len(shapes)} {name} are empty solids")
    found = torch.zeros(len(shapes), 3, num_points)
    if is_full.any():
        found[is_full] = surface_of_voxels(shapes[is_full], num_points, generator)
    return found
