"""The last draws of a host that draws and makes its loss separately, and which of them wait for a loss.

Dims: B batch.
"""

from collections import deque
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Drawn = TypeVar("Drawn")
# So many draws may wait for their losses at a time.
MAX_WAITING = 64


@dataclass(eq=False)
class _Waiting(Generic[Drawn]):
    timesteps: Tensor
    drawn: Drawn
    has_loss: bool = False


class WaitingDraws(Generic[Drawn]):
    """What was drawn, by its timesteps (B,).

    A loss belongs to the timesteps that come with it, or else to the newest draw. Older draws without a loss
    are those of steps that ended early. If they are not, a further loss comes for them, and is refused.
    """

    def __init__(self) -> None:
        self._draws: deque[_Waiting[Drawn]] = deque(maxlen=MAX_WAITING)
        self._skips_some = False

    def add(self, timesteps: Tensor, drawn: Drawn) -> None:
        """Keeps what was drawn for timesteps (B,)."""
        self._draws.append(_Waiting(timesteps, drawn))
        self._skips_some = False

    def has(self, timesteps: Any) -> bool:
        """Whether these are the timesteps (B,) of a draw that waits, or the tensor of one of the last."""
        waiting = [each for each in self._draws if not each.has_loss]
        return self.is_one(timesteps) or any(are_equal(each.timesteps, timesteps) for each in waiting)

    def is_one(self, timesteps: Any) -> bool:
        """Whether this is the very tensor of one of the last draws."""
        return any(each.timesteps is timesteps for each in self._draws)

    def of_loss(self, timesteps: Tensor | None = None, *, is_further_part: bool = False) -> Drawn:
        """What was drawn for a loss that is made now.

        Args:
            timesteps: (B,) of the draw; None is the newest.
            is_further_part: of a batch whose first part had its loss.

        Raises:
            ValueError: these timesteps were not drawn; or they are None, and a draw before the newest waits.
        """
        if timesteps is not None:
            found = self._find(timesteps)
            if found is None:
                raise ValueError("the policy did not draw the timesteps that are passed to mse_loss")
            found.has_loss = True
            return found.drawn
        waiting = [each for each in self._draws if not each.has_loss]
        if not waiting and self._skips_some and not is_further_part:
            raise ValueError(
                "mse_loss cannot tell to which draw this loss belongs: several draws came before it. Edit the"
                " script by hand, and pass timesteps=timesteps (FlowScript: indices=) with each loss"
            )
        if waiting:
            self._skips_some = len(waiting) > 1
            for each in waiting:
                each.has_loss = True
        return self._draws[-1].drawn

    def _find(self, timesteps: Any) -> _Waiting[Drawn] | None:
        """The newest draw of these timesteps."""
        newest_first = [*reversed(self._draws)]
        same = (each for each in newest_first if each.timesteps is timesteps)
        # Values are compared only where no tensor is the same, since the CPU waits for the device.
        equal = (each for each in newest_first if are_equal(each.timesteps, timesteps))
        return next(same, None) or next(equal, None)


def are_equal(first: Any, second: Any) -> bool:
    """Whether two timesteps are the same tensor, or have the same shape and values. Dtypes may differ."""
    if first is second:
        return True
    are_tensors = isinstance(first, Tensor) and isinstance(second, Tensor)
    return are_tensors and first.shape == second.shape and torch.equal(first.to(second), second)
