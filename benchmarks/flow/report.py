"""What a results file of benchmarks/flow says: laws against uniform and against the best of the grid."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.crossing import AT_MOST, Reading, Summary, first_crossing, null_band, speed_up, summary
from benchmarks.flow.laws import NORMALISED, is_fixed, logit_normal_name
from benchmarks.flow.results import Result

BASELINE, AUTO = "uniform", "auto"
# What trainers of flows draw from if nobody chooses.
USUAL = logit_normal_name(0.0, 1.0)


@dataclass(frozen=True)
class Curve:
    """Steps of the evaluations, and the distance at each."""

    steps: tuple[int, ...]
    distances: tuple[float, ...]

    @property
    def half(self) -> int:
        """Place of the evaluation nearest to half of the horizon."""
        return min(range(len(self.steps)), key=lambda at: abs(self.steps[at] - self.steps[-1] / 2))


# Law -> seed -> curve.
Curves = Mapping[str, Mapping[int, Curve]]


def report(results: Sequence[Result]) -> str:
    """Markdown: an overview, the search, then for each data set and setting a table per feature space."""
    parts = [overview(results), search(results)]
    for group in groups_of(results):
        first = group[0]
        facts, options = first.facts, first.options
        parts.append(
            f"## {first.data}, {options['prediction']}, {options['horizon']} steps\n\n"
            f"{facts['num_samples']} samples {tuple(facts['shape'])}, standard deviation {facts['std']:.3f};"
            f" half of the variance is explained at log-SNR {facts['centre']:.2f}, so logit-normal mean"
            f" {-facts['centre'] / 2:.2f}."
        )
        for sampler, spaces in first.distances.items():
            parts += [_table(group, sampler, space) for space in spaces]
    return "\n\n".join(parts)


def overview(results: Sequence[Result]) -> str:
    """A Markdown table of `auto` against the fixed laws: ratios of steps on the seeds that report."""
    lines = [
        "| data | space | chance | best fixed law | best over uniform | auto over uniform"
        " | auto over the best | auto over logit_normal(0,1) | uniform / loss | auto / loss"
        " | auto at its worst |",
        "|---" * 11 + "|",
    ]
    for group in groups_of(results):
        first, best = group[0], _best(group)
        for sampler, spaces in first.distances.items():
            for space in spaces:
                reporting = curves_of(group, sampler, space, chooses=False)
                if AUTO not in reporting:
                    continue
                name = f"{first.data}, {first.options['prediction']}, {sampler}"
                cells = [
                    name,
                    space,
                    _band(reporting),
                    best or "-",
                    _steps(reporting, best, BASELINE),
                    *(_steps(reporting, AUTO, over) for over in (BASELINE, best, USUAL)),
                    *(_steps(reporting, law + NORMALISED, BASELINE) for law in (BASELINE, AUTO)),
                    _worst(reporting, AUTO),
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def search(results: Sequence[Result]) -> str:
    """A Markdown table of all laws on the selection seeds: mean ln of the distance over uniform's at the end.

    A column has the spaces of a data set, under its first sampler.
    """
    columns: dict[str, dict[str, str]] = {}
    for group in groups_of(results):
        sampler, spaces = next(iter(group[0].distances.items()))
        name = f"{group[0].data}, {group[0].options['prediction']}: {', '.join(spaces)}"
        per_space = [curves_of(group, sampler, space, chooses=True) for space in spaces]
        for law in per_space[0]:
            cells = [f"{mean_log_ratio(curves, law):+.2f}" for curves in per_space]
            columns.setdefault(name, {})[law] = f"{', '.join(cells)} (N = {len(per_space[0][law])})"
    laws = sorted({law for column in columns.values() for law in column} - {BASELINE})
    lines = [f"| law | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {law} | {' | '.join(column.get(law, '') for column in columns.values())} |" for law in laws]
    return "\n".join(lines)


def leading(results: Sequence[Result], data: str, *, only_full: bool = False) -> list[str]:
    """The fixed laws of a data set, the one of the least distance at the horizon first, on selection seeds.

    Counts the mean of ln of the distance over uniform's in all feature spaces, under the first sampler: some
    laws gain in details what they lose in colours.

    Args:
        results: of any data sets.
        data: name of the data set.
        only_full: leave out laws with fewer seeds than another fixed law has.

    Raises:
        ValueError: no results of the data set on selection seeds.
    """
    groups = [group for group in groups_of(results) if group[0].data == data]
    found = _ranked(groups[0], only_full=only_full) if groups else []
    if not found:
        raise ValueError(f"the best laws of {data} need results with selection seeds, got none")
    return found


def log_ratio(curve: Curve, baseline: Curve, place: int) -> float:
    """ln of the distance over the baseline's; below 0 is nearer to the data."""
    return math.log(curve.distances[place] / baseline.distances[place])


def mean_log_ratio(curves: Curves, law: str, place: int = -1) -> float:
    """The mean of `log_ratio` over uniform of the seeds of a law; at the last evaluation unless told."""
    return mean_of([log_ratio(curve, curves[BASELINE][seed], place) for seed, curve in curves[law].items()])


def ratio_of_steps(curve: Curve, baseline: Curve) -> Reading:
    """Steps of the baseline over steps of the law, to the larger of their distances at the horizon.

    If the law is ahead there, this is the horizon over the steps until it reaches the baseline's distance. If
    it is behind, this is the steps until the baseline reaches the law's, over the horizon.
    """
    horizon = curve.steps[-1]
    reading = speed_up(curve.steps, curve.distances, baseline.distances, horizon)
    if reading.bound != AT_MOST:
        return reading
    reached = first_crossing(baseline.steps, baseline.distances, curve.distances[-1])
    return Reading(reached.value / horizon, reached.bound)


def _worst(curves: Curves, law: str) -> str:
    """Where the law is furthest behind the baseline, or least ahead: ln of the ratio of distances."""
    steps = next(iter(curves[law].values())).steps
    means = [mean_log_ratio(curves, law, place) for place in range(len(steps))]
    place = max(range(len(steps)), key=lambda at: means[at])
    return f"{means[place]:+.3f} at {steps[place]}"


def _best(group: Sequence[Result]) -> str:
    return next(iter(_ranked(group, only_full=True)), "")


def _ranked(group: Sequence[Result], *, only_full: bool) -> list[str]:
    sampler, spaces = next(iter(group[0].distances.items()))
    ratios: dict[str, list[float]] = defaultdict(list)
    for space in spaces:
        curves = curves_of(group, sampler, space, chooses=True)
        for law, by_seed in curves.items():
            if is_fixed(law) and NORMALISED not in law:
                ratios[law] += [log_ratio(c, curves[BASELINE][seed], -1) for seed, c in by_seed.items()]
    most = max((len(found) for law, found in ratios.items() if law != BASELINE), default=0)
    means = {law: mean_of(found) for law, found in ratios.items() if not only_full or len(found) >= most}
    return sorted(means, key=lambda law: means[law])


def _table(group: Sequence[Result], sampler: str, space: str) -> str:
    every = curves_of(group, sampler, space)
    choosing = curves_of(group, sampler, space, chooses=True)
    reporting = curves_of(group, sampler, space, chooses=False)
    data = group[0].data
    best = _best(group)
    lines = [
        f"### {data}, {sampler}, {space}",
        "",
        f"Floor {group[0].facts['floor'][space]:.4f} (the data against itself); uniform at the horizon"
        f" {mean_of([curve.distances[-1] for curve in every[BASELINE].values()]):.4f}. {_chance(every)}",
        f"Best fixed law on the selection seeds: {best or 'not known yet'}.",
        "",
        "| law | ln ratio at half | at the horizon | at its worst | steps, selection seeds"
        " | steps, report seeds | over the best fixed law |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for law, by_seed in every.items():
        some = next(iter(by_seed.values()))
        ratios = [
            [log_ratio(curve, every[BASELINE][seed], place) for seed, curve in by_seed.items()]
            for place in range(len(some.steps))
        ]
        cells = [
            _spread(ratios[some.half]),
            _spread(ratios[-1]),
            _worst(every, law),
            _steps(choosing, law, BASELINE),
            _steps(reporting, law, BASELINE),
            _steps(reporting, law, best),
        ]
        rows.append((mean_of(ratios[-1]), f"| {law} | {' | '.join(cells)} |"))
    return "\n".join(lines + [row for _, row in sorted(rows)])


def _steps(curves: Curves, law: str, baseline: str) -> str:
    """The mean ratio of steps with its interval and N, or - without a seed that both have."""
    if law == baseline or law not in curves or baseline not in curves:
        return "-"
    seeds = [seed for seed in curves[law] if seed in curves[baseline]]
    if not seeds:
        return "-"
    found: Summary = summary([ratio_of_steps(curves[law][s], curves[baseline][s]) for s in seeds])
    interval = f" ({found.low:.2f} to {found.high:.2f})" if len(seeds) > 1 else ""
    return f"{found.bound}{found.mean:.2f}{interval}, N = {len(seeds)}"


def _chance(curves: Curves) -> str:
    num_seeds = len(curves[BASELINE])
    if num_seeds == 1:
        return "One seed of uniform: chance is not known."
    return f"By chance {_band(curves)} ({num_seeds} seeds of uniform against each other)."


def _band(curves: Curves) -> str:
    """Ratios of steps of uniform over itself, 5 to 95 %; - with one seed."""
    by_seed = list(curves[BASELINE].values())
    band = null_band(by_seed[0].steps, [curve.distances for curve in by_seed], by_seed[0].steps[-1])
    return "-" if band is None else f"{band[0]} to {band[1]}"


def curves_of(
    group: Sequence[Result], sampler: str, space: str, *, chooses: bool | None = None
) -> dict[str, dict[int, Curve]]:
    """Law -> seed -> curve, of seeds that uniform has too; only seeds that choose, or that do not."""
    found: dict[str, dict[int, Curve]] = defaultdict(dict)
    for result in group:
        if chooses is None or result.chooses == chooses:
            distances = [math.inf if d is None else d for d in result.distances[sampler][space]]
            found[result.law][result.seed] = Curve(tuple(result.options["steps"]), tuple(distances))
    paired = found.get(BASELINE, {})
    both = {law: {s: c for s, c in by_seed.items() if s in paired} for law, by_seed in found.items()}
    return {law: by_seed for law, by_seed in both.items() if by_seed}


def groups_of(results: Sequence[Result]) -> list[list[Result]]:
    """Results that may be compared with each other: of one data set and one setting, with uniform."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[f"{result.data} {sorted(result.options.items())}"].append(result)
    return [group for group in groups.values() if any(result.law == BASELINE for result in group)]


def mean_of(values: Sequence[float]) -> float:
    """The arithmetic mean of one value or more."""
    return sum(values) / len(values)


def _spread(values: Sequence[float]) -> str:
    mean = mean_of(values)
    if len(values) == 1:
        return f"{mean:+.3f}"
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return f"{mean:+.3f} (sd {std:.3f}, N = {len(values)})"
