"""The phase `test`: metrics of samples, most against a reference. Each states its features and set sizes."""

from collections.abc import Iterator
from pathlib import Path

import torch

from speedit_plugins.registry import nearest
from speedit_plugins.trainer import results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import METRIC_OF, EvaluationConfig
from speedit_plugins.trainer.evaluation.metrics import CLIP_SCORE, METRICS, Figures, MetricValue, line_of
from speedit_plugins.trainer.evaluation.pairs import PAIRED, check_window
from speedit_plugins.trainer.models.pretrained.text import Clip
from speedit_plugins.trainer.parallel.runtime import build_device
from speedit_plugins.trainer.sampling.files.sample_sets import SampleSet, open_set, read_captions
from speedit_plugins.trainer.sampling.scores.comparison import Comparison
from speedit_plugins.trainer.sampling.scores.pairs import measure_pairs
from speedit_plugins.trainer.sampling.scores.score_files import show_scores, write_scores
from speedit_plugins.trainer.sampling.scores.shape_scores import measure_shapes
from speedit_plugins.trainer.sampling.scores.stage_scores import (
    StageScores,
    measure_stages,
    table,
    written_stages,
)
from speedit_plugins.trainer.sampling.super_resolution.stage_sets import WHOLE
from speedit_plugins.trainer.terminal import say


def test(config: ExperimentConfig) -> int:
    """Measures the metrics in `evaluation.metrics`, prints them and writes them to test.json.

    The samples are an npz or a folder. So is the reference; without one it is the dataset of the experiment.
    Shapes are compared with shapes that were not trained on, see `measure_shapes`. With `score_stages` the
    stages of a cascade are measured too, each against data of its size, see `measure_stages`.

    test.json is written after each set of a cascade and after each metric of shapes: a later failure leaves
    the figures before it.

    Raises:
        ValueError: sets, features and metrics do not fit each other, or an option has no effect.
    """
    path = Path(config.experiment_dir) / results.TEST
    num_said = 0
    for number, (figures, stages) in enumerate(_parts(config)):
        if number == 0:
            results.save_config(config, "test")
            results.keep_earlier(path)
        write_scores(path, figures, stages)
        for metric in figures.measured[num_said:]:
            say(line_of(metric))
        num_said = len(figures.measured)
    for line in table(stages) if stages else []:
        say(line)
    say(f"  samples      {figures.samples}")
    if figures.reference is not None:
        say(f"  reference    {figures.reference}")
    say(f"  result       {path}")
    # Last, because a board may be out of reach.
    show_scores(config, figures)
    return 0


def _parts(config: ExperimentConfig) -> Iterator[tuple[Figures, list[StageScores]]]:
    """The figures so far, each time that there are more of them; the last part has all.

    Yields:
        The figures of the samples, and those of the sets of a cascade's stages.
    """
    if config.score_stages:
        yield from _of_stages(config)
    elif config.voxel_size:
        for figures in measure_shapes(config):
            yield figures, []
    else:
        yield _of_images(config), []


def _of_stages(config: ExperimentConfig) -> Iterator[tuple[Figures, list[StageScores]]]:
    """Parts with one more set each. All sets are looked for before one is measured.

    The figures of the samples are those of the cascade as a whole. There are none before it is measured.
    """
    check_metrics(config.evaluation)
    _check_options(config)
    samples = _place(config)
    sets = written_stages(config, samples)
    for about, _ in sets:
        if about.inputs == "data" and "ssim" in config.evaluation.metrics:
            check_window(about.image_size, about.image_size)
    whole, scores = Figures((), str(samples)), []
    for each in measure_stages(config, sets, _of_images):
        scores.append(each)
        if each.about.name == WHOLE:
            whole = each.figures
        yield whole, list(scores)


def _of_images(config: ExperimentConfig) -> Figures:
    check_metrics(config.evaluation)
    _check_options(config)
    samples = open_set(_place(config), key="samples")
    metrics = [name for name in config.evaluation.metrics if name in METRICS]
    # First, because captions or originals may be missing and the other metrics take longer.
    pairs = measure_pairs(config, samples)
    clip_scores = [_clip_score(config, samples)] if CLIP_SCORE in config.evaluation.metrics else []
    measured, source = _compared(config, samples, metrics) if metrics else ([], None)
    measured += clip_scores + pairs
    return Figures(measured, str(samples.source), source)


def _compared(
    config: ExperimentConfig, samples: SampleSet, metrics: list[str]
) -> tuple[list[MetricValue], str | None]:
    """The metrics that need features, and the source of the reference, or None without one."""
    comparison = Comparison(config, samples, metrics)
    return comparison.measure(samples), comparison.source


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
    return results.newest_samples(config)


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
