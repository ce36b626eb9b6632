"""How many steps one training curve needs to get as far as another, over one seed and over several.

Some curves are below the level at their first evaluation, and some never get there. Both have no crossing and
give a bound instead. Every value computed from a bound is marked as a bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.spread import quantiles

AT_MOST, EXACT, AT_LEAST = "<=", "", ">="
MIXED = "~"
# The bound on 1 / value, for each bound on value.
REVERSED = {AT_MOST: AT_LEAST, AT_LEAST: AT_MOST, EXACT: EXACT, MIXED: MIXED}


@dataclass(frozen=True)
class Reading:
    """A number. AT_MOST or AT_LEAST make it the end of a range; MIXED comes from bounds of both kinds."""

    value: float
    bound: str = EXACT

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.2f}"


@dataclass(frozen=True)
class Summary:
    """Several seeds: their mean, the ends of its bootstrap interval, the median; `bound` as in `Reading`."""

    mean: float
    low: float
    high: float
    median: float
    bound: str
    num_seeds: int


def first_crossing(steps: Sequence[float], distances: Sequence[float], level: float) -> Reading:
    """Steps until the curve first reaches `level` > 0, interpolated in log steps and log distance.

    Args:
        steps: steps of the evaluations, rising, > 0.
        distances: distances at these steps, > 0; infinite where samples are not finite.
        level: distance to reach, > 0; an infinite one is reached at once.
    """
    if len(steps) != len(distances) or not steps:
        raise ValueError(f"a curve needs a distance a step, got {len(steps)} and {len(distances)}")
    if not level > 0:
        raise ValueError(f"level needs a distance > 0, got {level}")
    if distances[0] <= level:
        is_exact = distances[0] == level < math.inf
        return Reading(float(steps[0]), EXACT if is_exact else AT_MOST)
    for index in range(1, len(steps)):
        if distances[index] <= level:
            before, after = distances[index - 1], distances[index]
            share = 1.0 if math.isinf(before) else math.log(before / level) / math.log(before / after)
            return Reading(steps[index - 1] * (steps[index] / steps[index - 1]) ** share)
    return Reading(float(steps[-1]), AT_LEAST)


def speed_up(
    steps: Sequence[int], distances: Sequence[float], baseline: Sequence[float], horizon: int
) -> Reading:
    """Horizon / steps after which the curve reaches the baseline's distance there; above 1 is faster."""
    if horizon not in steps:
        raise ValueError(f"horizon needs one of the evaluated steps {list(steps)}, got {horizon}")
    reached = first_crossing(steps, distances, baseline[list(steps).index(horizon)])
    return Reading(horizon / reached.value, REVERSED[reached.bound])


def null_ratios(steps: Sequence[int], baselines: Sequence[Sequence[float]], horizon: int) -> list[Reading]:
    """The speed-up of each baseline seed over every other one. This is what chance alone gives."""
    return [
        speed_up(steps, other, level, horizon)
        for i, level in enumerate(baselines)
        for j, other in enumerate(baselines)
        if i != j
    ]


def null_band(
    steps: Sequence[int], baselines: Sequence[Sequence[float]], horizon: int
) -> tuple[Reading, Reading] | None:
    """The `band` of `null_ratios`.

    None for a single seed: there is no other to compare it with.
    """
    return band(null_ratios(steps, baselines, horizon))


def band(ratios: Sequence[Reading]) -> tuple[Reading, Reading] | None:
    """The 5 % and 95 % quantiles of ratios, or None. A quantile of bounds is marked as a bound."""
    if not ratios:
        return None
    ends = quantiles([ratio.value for ratio in ratios], (0.05, 0.95))
    # Bounds of one kind are the extreme values. The quantile lies between this place and the next.
    place = math.floor(0.05 * (len(ratios) - 1))
    low, high = (
        Reading(end, bound if sum(r.bound == bound for r in ratios) > place else EXACT)
        for end, bound in zip(ends, (AT_MOST, AT_LEAST), strict=True)
    )
    return low, high


def summary(readings: Sequence[Reading], *, num_resamples: int = 10_000, seed: int = 0) -> Summary:
    """Mean over seeds with its 95 % percentile bootstrap interval. A bound counts as its value.

    With few seeds the interval is too narrow. Under normal noise it holds the true mean in 84 % of cases with
    5 seeds and in 91 % with 11.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        readings: one per seed, at least one.
        num_resamples: number of resamples; each draws as many seeds as there are, with replacement.
        seed: seed of the resampling; the same readings give the same interval.
    """
    values = torch.tensor([reading.value for reading in readings], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(values), (num_resamples, len(values)), generator=generator)
    low, high = quantiles(values[picked].mean(dim=1).tolist(), (0.025, 0.975))
    bounds = {reading.bound for reading in readings} - {EXACT}
    bound = EXACT if not bounds else MIXED if len(bounds) > 1 else bounds.pop()
    median = float(values.quantile(0.5))
    return Summary(float(values.mean()), low, high, median, bound, len(values))
