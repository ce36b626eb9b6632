"""The table of sigmas of a flow-matching scheduler, whose rows a script draws: its time and its shift.

Dims: B batch, T rows of the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.schedules import shift_of
from speedit_plugins.policies.policy import TimestepDraw


@dataclass(frozen=True)
class Later:
    """A draw of a script, in whose place the policy draws when its rows are looked up.

    Args:
        u: that the script drew, (B,).
        draw: draws for the policy.
    """

    u: Tensor
    draw: Callable[[], Tensor]


def resumed(drawn: Tensor, own: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`own`, whose first value is drawn already: a script's generators go on as without the policy."""
    first = [drawn]
    return lambda: first.pop() if first else own()


def shift_in(scheduler: Any) -> float:
    """The shift s > 0 in a scheduler's table as it is now, by resolution too; 1 if there is none."""
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping) or not config.get("use_dynamic_shifting"):
        return shift_of(scheduler)
    sigmas = torch.as_tensor(scheduler.sigmas).double()[: len(scheduler.timesteps)]
    row = len(sigmas) // 2
    # Without a shift, row r of T has sigma 1 - r / T. A shift multiplies sigma / (1 - sigma).
    plain, shifted = 1 - row / len(sigmas), float(sigmas[row])
    return round(shifted * (1 - plain) / ((1 - shifted) * plain), 4)


def clock_of(num_rows: int, is_reversed: bool) -> HostsTime:
    """How a u in [0, 1) counts time: row floor(u T) of a table that begins with noise, or with data."""

    def time_of(u: Tensor) -> Tensor:
        row = (u.double() * num_rows).long()
        return ((row if is_reversed else num_rows - 1 - row).float() + 0.5) / num_rows

    def u_of(draw: TimestepDraw, u: Tensor) -> Tensor:
        row = draw.index if is_reversed else num_rows - 1 - draw.index
        return ((row.float() + 0.5) / num_rows).to(u)

    return HostsTime(time_of, u_of)
