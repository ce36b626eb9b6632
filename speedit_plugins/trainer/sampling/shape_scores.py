"""The phase `test` for shapes: how near the samples are to shapes that were not trained on.

Solids are compared by points on their surface. Everything is in the units of the data.

Dims: M shapes of each set, C channels, N points, D x H x W voxels.
"""

from dataclasses import replace
from pathlib import Path
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
from speedit_plugins.trainer.evaluation.metrics import MetricValue
from speedit_plugins.trainer.evaluation.shape_classifier import ShapeClassifier, frechet_shape_distance
from speedit_plugins.trainer.evaluation.shapes import DISTANCES, shape_scores
from speedit_plugins.trainer.layouts import POINTS, layout_of
from speedit_plugins.trainer.sampling.shape_files import read_shapes
from speedit_plugins.trainer.terminal import progress, say

FRECHET = "frechet"
METRICS = (*DISTANCES, FRECHET)
# Shapes of the training that the classifier of `frechet` learns from, at most.
NUM_LEARNED = 2000

Found = tuple[list[MetricValue], str, str | None]
"""Measured values, where the samples are, and the reference."""


def measure_shapes(config: ExperimentConfig) -> Found:
    """MMD, coverage and 1-NN accuracy by each distance of `evaluation.metrics`, and the Fréchet distance.

    The measures need two sets of one size: of the larger one, shapes are left out, and a line says so.

    Args:
        config: gives the metrics, the samples, and the reference: `reference`, or else `data.validation`, or
            else what `data.held_out_samples` keeps out of the training.

    Raises:
        ValueError: a metric is unknown, an option has no effect, there is no reference, or a set cannot be
            read or has another kind of shapes.
    """
    _check_options(config)
    folder = (
        Path(config.samples) if config.samples is not None else results.newest_samples(config, what="shapes")
    )
    drawn = read_shapes(folder)
    if drawn.ndim != (3 if layout_of(config) == POINTS else 5):
        raise ValueError(f"samples: {folder} has shapes {tuple(drawn.shape[1:])}, not {layout_of(config)}")
    dataset, source = _reference(config)
    number = min(len(drawn), len(dataset))
    if len(drawn) != len(dataset):
        say(f"comparing {number} of {len(drawn)} samples and {number} of {len(dataset)} reference shapes")
    generator = torch.Generator().manual_seed(stream_seed(config.seed, DATA_STREAM, 1))
    chosen = torch.randperm(len(dataset), generator=generator)[:number].sort().values
    reference = torch.stack([_labelled(config, dataset, int(index))[0] for index in chosen])
    ours = _clouds(drawn[:number], generator, "samples")
    theirs = _clouds(reference, generator, "reference shapes")
    measured = []
    for name in config.evaluation.metrics:
        if name == FRECHET:
            measured.append(_frechet(config, drawn[:number], reference))
            continue
        with progress(name, total=_num_searches(name, number), unit="search") as bar:
            scores = shape_scores(ours, theirs, distance=name, progress=bar.update)
        for label in ("mmd", "coverage", "one_nn_accuracy"):
            value, what = getattr(scores, label), f"{ours.shape[2]} points"
            measured.append(MetricValue(f"{label}[{name}]", value, what, number, number, has_reference=True))
    return measured, str(folder), source


def _frechet(config: ExperimentConfig, samples: Tensor, reference: Tensor) -> MetricValue:
    """The Fréchet distance in features of a classifier, which learns from the training's shapes."""
    dataset = build.build_dataset(config, augmented=False)
    if config.data.held_out_samples:
        dataset = hold_out(dataset, config.data.held_out_samples, seed=config.seed)[0]
    generator = torch.Generator().manual_seed(stream_seed(config.seed, DATA_STREAM, 2))
    chosen = torch.randperm(len(dataset), generator=generator)[:NUM_LEARNED].tolist()
    pairs = [_labelled(config, dataset, index) for index in chosen]
    shapes, labels = torch.stack([shape for shape, _ in pairs]), torch.tensor([label for _, label in pairs])
    classifier = ShapeClassifier(shapes, labels, seed=config.seed)
    say(f"the classifier of {FRECHET} is right on {classifier.accuracy:.1%} of shapes that it has not seen")
    distance = frechet_shape_distance(classifier, samples, reference)
    number, what = len(samples), f"a classifier of {len(shapes)} shapes"
    return MetricValue(FRECHET, distance, what, number, number, True, {"accuracy": classifier.accuracy})


def _check_options(config: ExperimentConfig) -> None:
    """Refuses metrics that are not of shapes, and options of other metrics."""
    options = config.evaluation
    known, names = ", ".join(METRICS), options.metrics
    if FRECHET in names and not config.num_classes:
        raise ValueError(f"{FRECHET} learns the classes of the training's shapes: wanted num_classes above 0")
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r} of shapes in evaluation.metrics; known: {known}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"evaluation.metrics needs each metric once, at least one of {known}, got {names}")
    defaults = EvaluationConfig()
    for key in (*METRIC_OF, "reference_statistics"):
        if getattr(options, key) != getattr(defaults, key):
            raise ValueError(f"evaluation.{key} has no effect on {', '.join(names)}")


def _num_searches(name: str, number: int) -> int:
    """How often a distance reports progress while the three tables of `number` shapes are measured."""
    return 4 * number if name == "chamfer" else number * (2 * number - 1)


def _reference(config: ExperimentConfig) -> tuple[SampleSource, str]:
    if config.reference is not None:
        sizes: dict[str, Any] = {"voxel_size": config.voxel_size}
        if config.num_points:
            # In the units of the samples, which are those of the data.
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
