"""Hosts that draw rows of a scheduler's table: the time of each row, and the rows that a law may draw.

Dims: N rows of the table, B batch.
"""

import torch
from torch import Tensor

from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

# Times of rows at an edge can be a bin or two away from it.
_MARGIN = 0.01


def clock_of_rows(times: Tensor, bounds: tuple[int, int]) -> HostsTime:
    """The clock of a host whose t are rows int64 (B,). A policy's own draw gets the nearest row.

    Args:
        times: of the rows, float32 (N,).
        bounds: the rows that the host trains, [first, last).

    Example:
        >>> clock = clock_of_rows(torch.tensor([0.9, 0.5, 0.1]), (0, 3))
        >>> clock.time_of(torch.tensor([2, 0]))
        tensor([0.1000, 0.9000])
    """
    allowed = times[slice(*bounds)]

    def t_of(draw: TimestepDraw, row: Tensor) -> Tensor:
        distance = (allowed - draw.time.to(allowed).view(-1, 1)).abs()
        return (distance.argmin(1) + bounds[0]).to(row)

    return HostsTime(lambda row: times[row], t_of)


def refuse_outside(policy: TimestepPolicy, times: Tensor, bounds: tuple[int, int], told: str) -> None:
    """Raises ValueError if a law of its own draws outside of the rows that the host trains.

    Args:
        policy: that draws.
        times, bounds: see `clock_of_rows`.
        told: the host's options that give the bounds.
    """
    if policy.is_relative or bounds == (0, len(times)):
        return
    inside = times[slice(*bounds)]
    low, high = float(inside.min()), float(inside.max())
    time = (torch.arange(len(policy.density)) + 0.5) / len(policy.density)
    outside = (time < low - _MARGIN) | (time > high + _MARGIN)
    if float(policy.density[outside].sum()) > 1e-6:
        raise ValueError(
            f"{policy.name!r} draws by a law of its own, not within {told}: give it"
            f" window={[round(low, 2), round(high, 2)]}"
        )
