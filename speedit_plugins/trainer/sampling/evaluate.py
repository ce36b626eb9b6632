"""The phase `test`: metrics of samples, most against a reference. Each states its features and set sizes.

Dims: N images or videos, F frames, H x W pixels, C channels, D features.
"""

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.registry import FEATURES, check, nearest
from speedit_plugins.registry import build as build_registered
from speedit_plugins.trainer import results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import METRIC_OF, EvaluationConfig
from speedit_plugins.trainer.data.loader import LABEL_STREAM, stream_seed
from speedit_plugins.trainer.evaluation.collected import (
    Collected,
    FeatureMoments,
    collect,
    load_collected,
    save_collected,
)
from speedit_plugins.trainer.evaluation.features import FeatureExtractor
from speedit_plugins.trainer.evaluation.metrics import (
    CLIP_SCORE,
    METRICS,
    MetricValue,
    Sides,
    check_numbers,
    label_of,
    line_of,
)
from speedit_plugins.trainer.evaluation.networks import FrameFeatures, Inception
from speedit_plugins.trainer.evaluation.npz import npz_keys, read_statistics
from speedit_plugins.trainer.evaluation.pairs import PAIRED, check_window
from speedit_plugins.trainer.models.pretrained.text import Clip
from speedit_plugins.trainer.parallel.runtime import build_device
from speedit_plugins.trainer.sampling.finite import of_one_value
from speedit_plugins.trainer.sampling.pairs import measure_pairs
from speedit_plugins.trainer.sampling.sample_sets import (
    SampleSet,
    alike,
    dataset_set,
    open_set,
    read_captions,
)
from speedit_plugins.trainer.sampling.score_files import show_scores, write_scores
from speedit_plugins.trainer.sampling.shape_scores import Found, measure_shapes
from speedit_plugins.trainer.sampling.stage_scores import StageScores, measure_stages, table, written_stages
from speedit_plugins.trainer.sampling.stage_sets import WHOLE
from speedit_plugins.trainer.terminal import progress, say


def test(config: ExperimentConfig) -> int:
    """Measures the metrics in `evaluation.metrics`, prints them and writes them to test.json.

    The samples are an npz or a folder. So is the reference; without one it is the dataset of the experiment.
    Shapes are compared with shapes that were not trained on, see `measure_shapes`. With `score_stages` the
    stages of a cascade are measured too, each against data of its size, see `measure_stages`.

    Raises:
        ValueError: sets, features and metrics do not fit each other, or an option has no effect.
    """
    folder = Path(config.experiment_dir)
    scores = _of_stages(config) if config.score_stages else []
    num_said = 0
    for measured, samples, source in _parts(config, scores):
        if not num_said:
            results.save_config(config, "test")
            results.keep_earlier(folder / results.TEST)
        # An absolute path can be found from any folder.
        path = str(Path(samples).absolute())
        write_scores(folder / results.TEST, measured, samples=path, reference=source, stages=scores)
        for metric in measured[num_said:]:
            say(line_of(metric))
        num_said = len(measured)
    for line in table(scores) if scores else []:
        say(line)
    say(f"  samples      {samples}")
    if source is not None:
        say(f"  reference    {source}")
    say(f"  result       {folder / results.TEST}")
    # Last, because a board may be out of reach.
    show_scores(config, measured, samples)
    return 0


def _parts(config: ExperimentConfig, scores: list[StageScores]) -> Iterator[Found]:
    """The figures so far, each time that there are more of them; the last part has all."""
    if scores:
        # Its figures are those of the test as a whole, as without stages.
        whole = next(each for each in scores if each.about.name == WHOLE)
        yield whole.measured, whole.samples, whole.reference
    elif config.voxel_size:
        yield from measure_shapes(config)
    else:
        yield _of_images(config)


def _of_stages(config: ExperimentConfig) -> list[StageScores]:
    """The figures of a cascade and of each of its stages. All sets are looked for before one is measured."""
    check_metrics(config.evaluation)
    _check_options(config)
    sets = written_stages(config, _place(config))
    for about, _ in sets:
        if about.inputs == "data" and "ssim" in config.evaluation.metrics:
            check_window(about.image_size, about.image_size)
    return measure_stages(config, sets, _of_images)


def _of_images(config: ExperimentConfig) -> Found:
    check_metrics(config.evaluation)
    _check_options(config)
    samples = open_set(_place(config), key="samples")
    metrics = [name for name in config.evaluation.metrics if name in METRICS]
    # First, because captions or originals may be missing and the other metrics take longer.
    pairs = measure_pairs(config, samples)
    clip_scores = [_clip_score(config, samples)] if CLIP_SCORE in config.evaluation.metrics else []
    measured, source = _compared(config, samples, metrics) if metrics else ([], None)
    measured += clip_scores + pairs
    return measured, str(samples.source), source


def _compared(
    config: ExperimentConfig, samples: SampleSet, metrics: list[str]
) -> tuple[list[MetricValue], str | None]:
    """The metrics that need features, and the source of the reference, or None without one."""
    comparison = Comparison(config, samples, metrics)
    return comparison.measure(samples), comparison.source


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


def check_metrics(options: EvaluationConfig) -> None:
    """Refuses unknown and repeated metrics, an empty list, and a CLIP score without a CLIP model.

    Raises:
        ValueError: one of these.
    """
    known = (*METRICS, CLIP_SCORE, *PAIRED)
    for name in options.metrics:
        if name not in known:
            close = nearest(name, known)
            raise ValueError(
                f"unknown metric {name!r} in evaluation.metrics{close}; known: {', '.join(known)}"
            )
    if not options.metrics or len(set(options.metrics)) < len(options.metrics):
        raise ValueError(f"evaluation.metrics needs each metric once, at least one, got {options.metrics}")
    if CLIP_SCORE in options.metrics and options.clip is None:
        raise ValueError("clip_score needs evaluation.clip, a folder or hub name of a CLIPModel; got null")


def _check_pairs(config: ExperimentConfig) -> None:
    """Refuses metrics of pairs where there are none: `hole_error` needs holes. Images may be too small."""
    is_enlarged = config.super_resolution.factor > 0
    for name in config.evaluation.metrics:
        if name not in PAIRED or config.inpainting is not None or (is_enlarged and name != "hole_error"):
            continue
        also = "" if name == "hole_error" else " or super_resolution"
        raise ValueError(f"{name} compares images with those that they were made of: wanted inpainting{also}")
    if "ssim" in config.evaluation.metrics:
        check_window(config.image_size, config.image_size)


def _check_options(config: ExperimentConfig) -> None:
    """Refuses options that have no effect, and a file of statistics that cannot be written."""
    options, defaults = config.evaluation, EvaluationConfig()
    _check_pairs(config)
    for key, metric in METRIC_OF.items():
        if metric not in options.metrics and getattr(options, key) != getattr(defaults, key):
            raise ValueError(f"evaluation.{key} has no effect without {metric} in evaluation.metrics")
    statistics = options.reference_statistics
    if not any(name in METRICS for name in options.metrics):
        for key, value in (("reference", config.reference), ("evaluation.reference_statistics", statistics)):
            if value is not None:
                raise ValueError(f"{key} has no effect on {', '.join(options.metrics)} alone; wanted null")
    if statistics is not None and (Path(statistics).is_dir() or not Path(statistics).parent.is_dir()):
        raise ValueError(
            f"evaluation.reference_statistics needs a file in a folder that is there, got {statistics}"
        )


def _place(config: ExperimentConfig) -> Path:
    """Where the samples are."""
    if config.samples is not None:
        return Path(config.samples)
    return results.newest_samples(config, what="videos" if config.num_frames else "npz")


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


def _clip_score(config: ExperimentConfig, samples: SampleSet) -> MetricValue:
    """100 max(cosine, 0) of a sample and its caption, averaged over samples, and over a video's frames.

    Source: Hessel et al. 2021, arXiv:2104.08718, with the usual factor of 100; Wu et al. 2021,
    arXiv:2104.14806 (frames).
    """
    options = config.evaluation
    assert options.clip is not None
    captions = read_captions(samples)
    device = build_device(config)
    clip = Clip(options.clip, device=device, allow_download=config.allow_download)
    total, done = 0.0, 0
    for batch in samples.batches(options.batch_size):
        texts = captions[done : done + len(batch)]
        frames = batch.unbind(1) if samples.is_video else (batch,)
        scores = torch.stack([clip.similarity(images, texts).clamp(min=0.0) for images in frames])
        total += float(scores.mean(dim=0).double().sum())
        done += len(batch)
    return MetricValue(f"{CLIP_SCORE}[{clip.name}]", 100.0 * total / len(samples), clip.name, len(samples))
