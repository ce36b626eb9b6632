"""How many steps one training curve needs to come as far as another, and what several seeds say of it.

A curve that is below the level at its first evaluation, or never is, has no crossing to read: it gives a
bound, and what is computed from it is marked as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from spread import quantiles

AT_MOST, EXACT, AT_LEAST = "<=", "", ">="
MIXED = "~"
# Of one over a value with that bound.
REVERSED = {AT_MOST: AT_LEAST, AT_LEAST: AT_MOST, EXACT: EXACT, MIXED: MIXED}


@dataclass(frozen=True)
class Reading:
    """A number; with `bound` AT_MOST or AT_LEAST the end of a range; MIXED: made of bounds of both kinds."""

    value: float
    bound: str = EXACT

    def __str__(self) -> str:
        return f"{self.bound}{self.value:.2f}"


@dataclass(frozen=True)
class Summary:
    """Of several seeds: mean, ends of its bootstrap interval, median; bound as in `Reading`."""

    mean: float
    low: float
    high: float
    median: float
    bound: str
    num_seeds: int


def first_crossing(steps: Sequence[int], distances: Sequence[float], level: float) -> Reading:
    """Steps until the curve first reaches `level` > 0, interpolated in log steps and log distance.

    Args:
        steps: of the evaluations, rising, > 0.
        distances: at these steps, > 0; infinite where samples are not finite.
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
    """Horizon over the steps that the curve needs to the baseline's distance there; above 1 is faster."""
    if horizon not in steps:
        raise ValueError(f"horizon needs one of the evaluated steps {list(steps)}, got {horizon}")
    reached = first_crossing(steps, distances, baseline[list(steps).index(horizon)])
    return Reading(horizon / reached.value, REVERSED[reached.bound])


def null_ratios(steps: Sequence[int], baselines: Sequence[Sequence[float]], horizon: int) -> list[Reading]:
    """The speed-up of each baseline seed over each other one: what chance alone gives."""
    return [
        speed_up(steps, other, level, horizon)
        for i, level in enumerate(baselines)
        for j, other in enumerate(baselines)
        if i != j
    ]


def null_band(
    steps: Sequence[int], baselines: Sequence[Sequence[float]], horizon: int
) -> tuple[Reading, Reading] | None:
    """The 5 % and 95 % quantiles of `null_ratios`, bounds where they are taken from bounds.

    None of one seed, which has no other.
    """
    ratios = null_ratios(steps, baselines, horizon)
    if not ratios:
        return None
    ends = quantiles([ratio.value for ratio in ratios], (0.05, 0.95))
    # Bounds of one kind are the extreme values; the quantile lies between this one, from 0, and the next.
    place = math.floor(0.05 * (len(ratios) - 1))
    low, high = (
        Reading(end, bound if sum(r.bound == bound for r in ratios) > place else EXACT)
        for end, bound in zip(ends, (AT_MOST, AT_LEAST), strict=True)
    )
    return low, high


def summary(readings: Sequence[Reading], *, num_resamples: int = 10_000, seed: int = 0) -> Summary:
    """Mean over seeds, with the 95 % percentile bootstrap interval of it; a bound counts at its value.

    Of few values the interval is narrow: with normal noise it holds the true mean in 84 % of cases of 5 seeds
    and in 91 % of 11.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13.

    Args:
        readings: one a seed, at least one.
        num_resamples: draws of as many seeds with replacement.
        seed: of the draws: the same readings give the same interval.
    """
    values = torch.tensor([reading.value for reading in readings], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(values), (num_resamples, len(values)), generator=generator)
    low, high = quantiles(values[picked].mean(dim=1).tolist(), (0.025, 0.975))
    bounds = {reading.bound for reading in readings} - {EXACT}
    bound = EXACT if not bounds else MIXED if len(bounds) > 1 else bounds.pop()
    median = float(values.quantile(0.5))
    return Summary(float(values.mean()), low, high, median, bound, len(values))
