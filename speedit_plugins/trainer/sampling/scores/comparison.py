"""Samples and their reference in features: the statistics of both, and the metrics that compare them."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.registry import FEATURES, check
from speedit_plugins.registry import build as build_registered
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import EvaluationConfig
from speedit_plugins.trainer.data.loader import LABEL_STREAM, stream_seed
from speedit_plugins.trainer.evaluation.collected import (
    Collected,
    FeatureMoments,
    collect,
    load_collected,
    save_collected,
)
from speedit_plugins.trainer.evaluation.features import FeatureExtractor
from speedit_plugins.trainer.evaluation.metrics import METRICS, MetricValue, Sides, check_numbers, label_of
from speedit_plugins.trainer.evaluation.networks import FrameFeatures, Inception
from speedit_plugins.trainer.evaluation.npz import npz_keys, read_statistics
from speedit_plugins.trainer.parallel.runtime import build_device
from speedit_plugins.trainer.sampling.files.sample_sets import SampleSet, alike, dataset_set, open_set
from speedit_plugins.trainer.sampling.finite import of_one_value
from speedit_plugins.trainer.terminal import progress, say


class Comparison:
    """A reference, and the features in which sets of samples are compared with it.

    Args:
        config: gives the reference, the features and the options of the metrics.
        example: a set as those to measure: as many samples, of the same shape.
        metrics: what to measure; all but the CLIP score.
        keep_in: folder that keeps the statistics of the reference, where the config names no file for them.

    Raises:
        ValueError: the set, the reference, the features and the metrics do not fit each other.
    """

    def __init__(
        self, config: ExperimentConfig, example: SampleSet, metrics: list[str], *, keep_in: Path | None = None
    ) -> None:
        options = config.evaluation
        self._config, self._options, self._metrics = config, options, metrics
        self._stated = _stated_statistics(config)
        wanted = {METRICS[name].kind for name in metrics if METRICS[name].has_reference}
        missing = wanted - self._stated.keys()
        self._reference = None
        if missing or _trains_on_reference(config):
            example, self._reference = alike(example, _reference(config, example))
        elif not wanted and config.reference is not None:
            raise ValueError(f"reference has no effect on {', '.join(metrics)}; wanted null")
        self._num_reference = None if self._reference is None else len(self._reference)
        check_numbers(metrics, options, num_samples=len(example), num_reference=self._num_reference)
        if options.reference_statistics is not None and not missing:
            raise ValueError("evaluation.reference_statistics has no effect: no statistics are computed")
        self._extractor = _extractor(config, self._reference, is_video=example.is_video)
        self._kinds = {METRICS[name].kind for name in metrics}
        _try_out(example, self._extractor, self._kinds, self._stated)
        theirs = Collected()
        if missing:
            assert self._reference is not None
            theirs = _collected_reference(options, self._reference, self._extractor, missing, keep_in)
        stated = {kind: self._stated[kind] for kind in wanted & self._stated.keys()}
        self._theirs = replace(theirs, **cast(Any, stated))
        # Nothing is compared with it where no metric has a reference.
        source = config.reference if self._reference is None else self._reference.source
        self.source = source if wanted else None

    def measure(self, samples: SampleSet) -> list[MetricValue]:
        """The metrics of a set like the example."""
        if self._reference is not None:
            samples, _ = alike(samples, self._reference)
        ours = _collected("samples", samples, self._extractor, self._options, self._kinds)
        sides = Sides(ours, self._theirs, self._options, stream_seed(self._config.seed, LABEL_STREAM))
        measured = []
        for name in self._metrics:
            metric = METRICS[name]
            is_counted = metric.has_reference and metric.kind not in self._stated
            numbers = (len(samples), self._num_reference if is_counted else None)
            for label, value, details in metric.measure(sides):
                called = label_of(label, self._extractor)
                measured.append(
                    MetricValue(called, value, self._extractor.name, *numbers, metric.has_reference, details)
                )
        return measured


def _try_out(
    samples: SampleSet, extractor: FeatureExtractor, kinds: set[str], stated: dict[str, FeatureMoments]
) -> None:
    """Tries the features on two samples first, and refuses those that a metric cannot use."""
    few = next(samples.batches(2))
    found = collect([few], extractor, num_samples=len(few), kinds=kinds)
    for kind in kinds & stated.keys():
        ours, theirs = len(getattr(found, kind).mean), len(stated[kind].mean)
        if ours != theirs:
            raise ValueError(
                f"the statistics in the reference are of {theirs} features, those of {extractor.name} are"
                f" {ours}"
            )


def _reference(config: ExperimentConfig, samples: SampleSet) -> SampleSet:
    reference = (
        dataset_set(config) if config.reference is None else open_set(config.reference, key="reference")
    )
    if reference.is_video != samples.is_video:
        raise ValueError(
            f"test compares images with images and videos with videos, got {samples.source} and"
            f" {reference.source}"
        )
    return reference


def _stated_statistics(config: ExperimentConfig) -> dict[str, FeatureMoments]:
    """The statistics in a reference's npz, as in ADM's. They are Inception's: other features take none."""
    path = config.reference
    if path is None or not Path(path).is_file() or config.features["type"] != Inception.name:
        return {}
    keys = npz_keys(path)
    found = {}
    for kind, key in (("gaussian", "mu"), ("spatial", "mu_s")):
        if key in keys:
            # They cover more images than the file holds, and the file does not say how many.
            found[kind] = FeatureMoments(*read_statistics(path, spatial=kind == "spatial"), None)
    return found


def _trains_on_reference(config: ExperimentConfig) -> bool:
    """Whether building the features needs the images of the reference."""
    check(FEATURES, config.features, images=None, labels=None, device=None)
    builder = FEATURES.module_dict[str(config.features["type"])]
    return "images" in inspect.signature(builder).parameters


def _extractor(config: ExperimentConfig, reference: SampleSet | None, *, is_video: bool) -> FeatureExtractor:
    """The extractor that `features` names, on the run's device. An image network sees a video's frames."""
    given: dict[str, Any] = {"device": build_device(config)}
    if _trains_on_reference(config):
        assert reference is not None
        given |= {
            "images": torch.cat(list(reference.batches(config.evaluation.batch_size))),
            "labels": reference.labels(),
        }
    extractor: FeatureExtractor = build_registered(FEATURES, config.features, **given)
    takes_videos = getattr(extractor, "takes_videos", False)
    if takes_videos and not is_video:
        raise ValueError(f"features {extractor.name} need videos, got images")
    if is_video and not takes_videos:
        return FrameFeatures(extractor)
    return extractor


def _collected_reference(
    options: EvaluationConfig,
    reference: SampleSet,
    extractor: FeatureExtractor,
    kinds: set[str],
    keep_in: Path | None = None,
) -> Collected:
    """The reference's statistics: read from `reference_statistics` if the file exists, else written to it.

    Without that key they are in a file of `keep_in`, which has another name for anything else.
    """
    if options.reference_statistics is None and keep_in is None:
        return _collected("reference", reference, extractor, options, kinds)
    identity = {
        "features": str(getattr(extractor, "identity", extractor.name)),
        "fingerprint": reference.fingerprint(),
    }
    if options.reference_statistics is not None:
        path = Path(options.reference_statistics)
    else:
        assert keep_in is not None
        name = sha256(json.dumps([identity, sorted(kinds)]).encode()).hexdigest()[:8]
        path = keep_in / f"reference_{name}.safetensors"
    if path.exists():
        return load_collected(path, kinds=kinds, **identity)
    collected = _collected("reference", reference, extractor, options, kinds)
    save_collected(path, collected, **identity)
    return collected


def _collected(
    name: str, images: SampleSet, extractor: FeatureExtractor, options: EvaluationConfig, kinds: set[str]
) -> Collected:
    """`collect` with a progress bar."""

    flat = 0

    def shown() -> Iterator[Tensor]:
        nonlocal flat
        for batch in images.batches(options.batch_size):
            flat += of_one_value(batch)
            yield batch
            bar.update(len(batch))

    with progress(name, total=len(images), unit="video" if images.is_video else "image") as bar:
        try:
            collected = collect(shown(), extractor, num_samples=len(images), kinds=kinds)
        except ValueError as error:
            raise ValueError(f"{name}, {images.source}: {error}") from error
    if flat:
        # Other programs write samples that are not finite as black images.
        say(f"warning: {flat} of {len(images)} in {images.source} have the same value in every pixel")
    return collected
