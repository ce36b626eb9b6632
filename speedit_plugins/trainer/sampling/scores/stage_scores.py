"""The phase `test` for each stage of a cascade, on the sets that inference wrote with `score_stages`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.metrics import Figures
from speedit_plugins.trainer.evaluation.pairs import PAIRED
from speedit_plugins.trainer.results import STAGES
from speedit_plugins.trainer.sampling.super_resolution.cascade import trained_stages
from speedit_plugins.trainer.sampling.super_resolution.stage_sets import WHOLE, StageSet, read_list


@dataclass(frozen=True)
class StageScores:
    """A set of samples of a stage, and its figures."""

    about: StageSet
    figures: Figures


def written_stages(config: ExperimentConfig, samples: Path) -> list[tuple[StageSet, Path]]:
    """The sets that belong to samples of a cascade, and where each is.

    Args:
        config: of the last stage, with its cascade.
        samples: of the whole cascade: an npz, or a folder of videos.

    Raises:
        ValueError: inference wrote none beside them, or wrote those of other runs, or one is gone.
    """
    folder = samples.parent / f"{samples.stem if samples.suffix == '.npz' else samples.name}_{STAGES}"
    found = read_list(folder)
    runs = [str(Path(run).absolute()) for run in (*config.cascade, config.experiment_dir)]
    drawn = {each.number: each.run for each in found}
    if runs != [drawn[number] for number in sorted(drawn)]:
        got = ", ".join(drawn[number] for number in sorted(drawn))
        raise ValueError(f"{folder} was drawn by other runs: {got}; wanted {', '.join(runs)}")
    places = [(each, samples if each.name == WHOLE else folder / each.name) for each in found]
    missing = next((place for _, place in places if not place.exists()), None)
    if missing is not None:
        raise ValueError(f"score_stages needs {missing}, got nothing there; wanted all sets of {folder}")
    return places


def measure_stages(
    config: ExperimentConfig,
    sets: Sequence[tuple[StageSet, Path]],
    measure: Callable[[ExperimentConfig], Figures],
) -> Iterator[StageScores]:
    """The metrics of each set against the data of its stage; those of pairs only where its inputs are data.

    Yields:
        The figures of a set, once they are measured.

    Args:
        config: gives the metrics, their features, and the reference of sets in the full size.
        sets: see `written_stages`.
        measure: measures the `samples` of a config.

    Raises:
        ValueError: see `test`.
    """
    # With the seeds of their trainings: those decide what was held out.
    stages = [*trained_stages(config), config]
    for about, place in sets:
        stage = stages[about.number - 1]
        is_last = stage is config
        metrics = [name for name in config.evaluation.metrics if about.inputs == "data" or name not in PAIRED]
        statistics = config.evaluation.reference_statistics if is_last else None
        of_set = replace(
            stage,
            samples=str(place),
            reference=config.reference if is_last else None,
            features=config.features,
            evaluation=replace(config.evaluation, metrics=metrics, reference_statistics=statistics),
            cascade=[],
            score_stages=False,
        )
        yield StageScores(about, measure(of_set) if metrics else Figures((), str(place)))


def table(scores: Sequence[StageScores]) -> list[str]:
    """Lines of a table: stage, pixels, input, and a column for each metric."""
    names = list(dict.fromkeys(metric.name for each in scores for metric in each.figures.measured))
    rows = [["stage", "pixels", "input", *names]]
    for each in scores:
        about = each.about
        values = {metric.name: f"{metric.value:.4f}" for metric in each.figures.measured}
        stage = f"{about.number}{' (whole)' if about.name == WHOLE else ''}"
        given = f"stage {about.number - 1}" if about.inputs == "stage" else about.inputs
        rows.append([stage, str(about.image_size), given, *(values.get(name, "-") for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
