"""Steps and seconds to equal distance: how many times faster an arm is than the base.

Equal distance is the larger of the two distances at the horizon. An arm that is ahead there is asked when it
reached the base's last distance. An arm that is behind is compared with when the base reached the arm's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from benchmarks.compose.results import Pace, Training
from benchmarks.crossing import AT_MOST, EXACT, MIXED, REVERSED, Reading, band, first_crossing


@dataclass(frozen=True)
class Equal:
    """Steps of the base and of an arm to the same distance; `bound` is that of `base_steps / steps`."""

    base_steps: float
    steps: float
    bound: str

    @property
    def factor(self) -> Reading:
        """Steps of the base over steps of the arm; above 1 the arm is faster."""
        return Reading(self.base_steps / self.steps, self.bound)

    def factor_of_seconds(self, pace: Pace, horizon: int) -> Reading:
        """Seconds of the base over seconds of the arm."""
        return Reading(self.base_steps / pace.seconds(self.steps, horizon), self.bound)


@dataclass(frozen=True)
class Factor:
    """Several seeds: geometric mean, smallest and largest value, and the kind of bound as in `Reading`."""

    mean: float
    low: float
    high: float
    bound: str
    num_seeds: int

    def __str__(self) -> str:
        spread = f" ({self.low:.2f} to {self.high:.2f})" if self.num_seeds > 1 else ""
        return f"{self.bound}{self.mean:.2f}{spread}"


def equal_distance(steps: Sequence[int], distances: Sequence[float], baseline: Sequence[float]) -> Equal:
    """The steps of the base and of the arm to equal distance.

    Args:
        steps: of the evaluations of both, rising.
        distances: of the arm; infinite where it diverged.
        baseline: of the base, finite at the end.
    """
    horizon = float(steps[-1])
    if distances[-1] <= baseline[-1]:
        reached = first_crossing(steps, distances, baseline[-1])
        return Equal(horizon, reached.value, REVERSED[reached.bound])
    if math.isinf(distances[-1]):
        # It never gets anywhere: at least as slow as the base's first evaluation over the horizon.
        return Equal(float(steps[0]), horizon, AT_MOST)
    reached = first_crossing(steps, baseline, distances[-1])
    return Equal(reached.value, horizon, reached.bound)


def product(factors: Sequence[Reading]) -> Reading:
    """The product of factors; bounds of both kinds make it MIXED."""
    bounds = {factor.bound for factor in factors} - {EXACT}
    bound = EXACT if not bounds else MIXED if len(bounds) > 1 else bounds.pop()
    return Reading(math.prod(factor.value for factor in factors), bound)


def over_seeds(factors: Sequence[Reading]) -> Factor:
    """The geometric mean of one factor or more: the mean of a product is then the product of the means."""
    values = [factor.value for factor in factors]
    mean = math.exp(sum(math.log(value) for value in values) / len(values))
    return Factor(mean, min(values), max(values), product(factors).bound, len(values))


def curve(training: Training, space: str) -> list[float]:
    """The distances in a space; None in the file is infinite."""
    return [math.inf if distance is None else distance for distance in training.distances[space]]


def chance(bases: Mapping[int, Training], space: str) -> str:
    """5 and 95 % of the factors of steps of the base's seeds over each other; "-" with one seed."""
    curves = [curve(training, space) for training in bases.values()]
    steps = next(iter(bases.values())).steps
    found = band([equal_distance(steps, *pair).factor for pair in permutations(curves, 2)])
    return "-" if found is None else f"{found[0]} to {found[1]}"
