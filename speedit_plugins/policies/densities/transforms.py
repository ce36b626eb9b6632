"""Transforms of any law: a shift towards noise, and a window.

In a config they are the keys `shift` and `window`, of a policy or of a density. A shift comes first. The
window then cuts what the model sees.

Dims: T timesteps.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.composed import Composed, Law, composed
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.resolution import RESOLUTIONS, ShiftOfGrid
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import build, check_type

KEYS = ("shift", "window")


def transformed(law: Law, transforms: Mapping[str, Any], schedule: NoiseSchedule) -> Law:
    """A law with the transforms of a config.

    Args:
        law: fixed or adaptive.
        transforms: `shift`: a number, or a mapping whose type is one of `RESOLUTIONS`. `window`: two bounds,
            or a mapping, see `Window`.
        schedule: of the law.

    Raises:
        ValueError: a value is out of range or of the wrong kind, or no draw is left.

    Example:
        >>> schedule = NoiseSchedule.rectified_flow(4)
        >>> law = Density(torch.ones(4))
        >>> transformed(law, {"shift": 3, "window": [0.25, 1]}, schedule).table.round(decimals=3).tolist()
        [0.0, 0.167, 0.278, 0.556]
    """
    shift = transforms.get("shift")
    if isinstance(shift, str | Mapping):
        of_grid: ShiftOfGrid = build(RESOLUTIONS, shift)
        law = ResolutionShifted(law, of_grid, schedule)
    elif shift is not None:
        factor = _checked_shift(shift)
        law = composed([law], partial(_shifted_first, shift=factor, schedule=schedule))
    window = transforms.get("window")
    if window is None:
        return law
    return _windowed(law, window)


def shifted(table: Tensor, shift: float, schedule: NoiseSchedule) -> Tensor:
    """The law of s u / (1 + (s - 1) u), if u has the law `table` (T,): log-SNR moves by -2 ln s.

    u = sigma / (alpha + sigma) is the time of a straight path with the same SNR: t, on a rectified flow. What
    is moved past an end of the schedule is cut off, and the rest divided by its sum. A rectified flow has no
    such ends. Inside the bin of a timestep the law is even in u.
    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.

    Args:
        table: probabilities, shape (T,).
        shift: s, > 0 and finite. Above 1 is noisier.

    Raises:
        ValueError: everything is moved past the end.

    Example:
        >>> law = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> shifted(law, 3.0, NoiseSchedule.rectified_flow(2)).tolist()  # u < 1/2 becomes u < 3/4
        [0.25, 0.75]
    """
    edges = _edges(schedule)
    below = torch.cat([table.new_zeros(1), table.cumsum(0)])
    moved = _interpolated(edges / (shift - (shift - 1) * edges), edges, below).diff()
    if not moved.sum() > 0:
        raise ValueError(f"a shift of {shift:g} moves every draw past the end of {schedule!r}")
    return moved / moved.sum()


def _shifted_first(tables: Sequence[Tensor], shift: float, schedule: NoiseSchedule) -> Tensor:
    return shifted(tables[0], shift, schedule)


class Window(Composed):
    """A law cut to low <= u <= high and divided by what is left, u = (index + 1/2) / T.

    The bounds may move, from `start` to (`low`, `high`), evenly over `steps` training steps. A timestep that
    a bound divides keeps that share of its probability.

    Args:
        law: the law to cut.
        low: in [0, 1).
        high: in (low, 1].
        start: bounds at the first step; None is a window that stays.
        steps: training steps until (low, high) are reached, >= 1. Needs `start`.

    Raises:
        ValueError: bounds out of range, only one of `start` and `steps`, a window without any draw at some
            step, or a law that waits for losses of every timestep.

    Example:
        >>> window = Window(Density(torch.ones(4)), 0.0, 1.0, start=(0.5, 1.0), steps=2)
        >>> window.density().table.tolist()
        [0.0, 0.0, 0.5, 0.5]
        >>> window.advance(1)
        True
        >>> window.density().table.round(decimals=3).tolist()
        [0.0, 0.333, 0.333, 0.333]
    """

    def __init__(
        self,
        law: Law,
        low: float = 0.0,
        high: float = 1.0,
        *,
        start: Sequence[float] | None = None,
        steps: int | None = None,
    ) -> None:
        if (start is None) != (steps is None):
            raise ValueError(f"a window that moves needs start and steps, got {start} and {steps}")
        if steps is not None and steps < 1:
            raise ValueError(f"window needs steps >= 1, got {steps}")
        self._end = _checked_bounds((low, high))
        self._start = self._end if start is None else _checked_bounds(start)
        self._steps = 1 if steps is None else steps
        self._step = 0
        super().__init__([law], self._cut)
        if self.needs_every_timestep:
            raise ValueError("this law waits for losses of every timestep, and a window leaves some out")
        # Every step now, not in the middle of the training; at most a thousand of them.
        for step in range(0, self._steps + 1, max(1, self._steps // 1000)):
            self._step = step
            self.density()
        self._step = 0

    @property
    def follows_steps(self) -> bool:
        """Whether the bounds move, or the law follows the steps."""
        return self._start != self._end or super().follows_steps

    def advance(self, step: int) -> bool:
        before, self._step = self._bounds(), step
        return super().advance(step) or before != self._bounds()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, **super().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])
        super().load_state_dict(state)

    def _bounds(self) -> tuple[float, float]:
        share = min(1.0, self._step / self._steps)
        low, high = (a + share * (b - a) for a, b in zip(self._start, self._end, strict=True))
        return low, high

    def _cut(self, tables: Sequence[Tensor]) -> Tensor:
        (table,), T = tables, len(tables[0])
        low, high = self._bounds()
        first = torch.arange(T, dtype=table.dtype) / T
        left = table * T * ((first + 1 / T).clamp(max=high) - first.clamp(min=low)).clamp(min=0)
        if not left.sum() > 0:
            raise ValueError(f"a window of {low:g} to {high:g} leaves no timestep that is ever drawn")
        return left


class ResolutionShifted(Composed):
    """A law that is shifted by the size of the data: see `shifted` and `RESOLUTIONS`.

    Args:
        law: the law to shift.
        of_grid: the shift for a batch's shape.
        schedule: of the law.
    """

    def __init__(self, law: Law, of_grid: ShiftOfGrid, schedule: NoiseSchedule) -> None:
        super().__init__([law], self._moved)
        self._of_grid, self._schedule = of_grid, schedule
        # None before the first batch.
        self._shift: float | None = None

    def _moved(self, tables: Sequence[Tensor]) -> Tensor:
        return tables[0] if self._shift is None else shifted(tables[0], self._shift, self._schedule)

    @property
    def needs_data(self) -> bool:
        """Always: the shape of a batch."""
        return True

    @property
    def differs_by_rank(self) -> bool:
        """Always: the batches of the ranks may have different shapes."""
        return True

    @property
    def is_ready(self) -> bool:
        """Whether it has seen the shape of a batch."""
        return self._shift is not None

    def observe(self, data: Tensor) -> bool:
        before, self._shift = self._shift, self._of_grid(tuple(data.shape[1:]))
        return super().observe(data) or before != self._shift


def _windowed(law: Law, window: Any) -> Law:
    options = dict(window) if isinstance(window, Mapping) else {}
    if isinstance(window, Mapping) and not window:
        raise ValueError("window needs bounds, got an empty mapping, which has no effect")
    if not isinstance(window, Mapping):
        options["low"], options["high"] = _pair(window)
    known = ("low", "high", "start", "steps")
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"window has no parameter {unknown[0]!r}; known: {', '.join(known)}")
    for name in ("low", "high"):
        check_type(f"window {name}", options.get(name, 0.0), float)
    check_type("window steps", options.get("steps"), int | None)
    found = Window(law, **options)
    # A window that stays, of a law that stays, is a table.
    return found.density() if isinstance(law, Density) and "start" not in options else found


def _pair(bounds: Any) -> tuple[Any, Any]:
    if isinstance(bounds, str) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise ValueError(f"window needs two bounds, [low, high], or a mapping, got {bounds!r}")
    return bounds[0], bounds[1]


def _checked_bounds(bounds: Any) -> tuple[float, float]:
    low, high = _pair(bounds)
    for bound in (low, high):
        check_type("a window's bound", bound, float)
    if not 0 <= low < high <= 1:
        raise ValueError(f"window needs 0 <= low < high <= 1, got {low:g} and {high:g}")
    return float(low), float(high)


def _checked_shift(shift: Any) -> float:
    check_type("shift", shift, float)
    if not 0 < shift < math.inf:
        raise ValueError(f"shift needs a finite number > 0, got {shift}")
    return float(shift)


def _edges(schedule: NoiseSchedule) -> Tensor:
    """Bounds (T + 1,) of the timesteps in u = sigma / (alpha + sigma), rising in [0, 1]."""
    u = schedule.sigma / (schedule.alpha + schedule.sigma)
    inner = (u[1:] + u[:-1]) / 2
    if not len(inner):
        return u.new_tensor([0.0, 1.0])
    first, last = 2 * u[:1] - inner[:1], 2 * u[-1:] - inner[-1:]
    return torch.cat([first, inner, last]).clamp(0, 1)


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """ys (N,) at x (M,), linear between the rising xs (N,) and constant outside of them."""
    right = torch.searchsorted(xs, x.clamp(xs[0], xs[-1])).clamp(1, len(xs) - 1)
    low, high = xs[right - 1], xs[right]
    share = ((x.clamp(xs[0], xs[-1]) - low) / (high - low).clamp(min=1e-300)).clamp(0, 1)
    return ys[right - 1] + share * (ys[right] - ys[right - 1])
