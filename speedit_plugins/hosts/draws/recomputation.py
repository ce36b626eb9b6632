"""Calls inside `torch.utils.checkpoint`, which computes a part of a step twice.

With `use_reentrant=True` the first computation runs without gradients, as an evaluation does. The second one
runs in the backward pass. It has to see the draw of the first, and is no training call of its own.

Dims: B batch.
"""

import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from speedit_plugins.hosts.draws.waiting_draws import MAX_WAITING, are_equal


def is_training() -> bool:
    """Whether the loss that is made now is trained on, and not that of an evaluation."""
    return torch.is_grad_enabled() or is_first_of_two()


def is_first_of_two() -> bool:
    """Whether this runs without gradients because a checkpoint computes it again in the backward pass."""
    if torch.is_grad_enabled():
        return False
    frame: Any = sys._getframe(1)
    while frame is not None:
        # torch's checkpoint, and those of DeepSpeed and Megatron, are functions with a `forward(ctx, ...)`.
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        # Without edges the checkpoint itself was called without gradients.
        if isinstance(context, BackwardCFunction) and context.next_functions:
            return True
        frame = frame.f_back
    return False


def is_recomputing() -> bool:
    """Whether this runs in a backward pass: a checkpoint computes a part of its step again."""
    return torch._C._current_graph_task_id() != -1


def refuse_checkpoint() -> None:
    """Raises ValueError in a checkpoint, for hosts whose draw and loss are two calls."""
    if is_recomputing() or is_first_of_two():
        raise ValueError(
            "torch.utils.checkpoint runs this twice: draw the timesteps, and make their loss, outside of the"
            " checkpoint"
        )


@dataclass(frozen=True)
class _Call:
    """A training call: the host's t and data as it got them, and what was drawn for it."""

    t: Tensor | None
    place: tuple[int, torch.Size] | None
    drawn: Any


class RecentCalls:
    """What was drawn in the last training calls, for their recomputations."""

    def __init__(self) -> None:
        self._calls: deque[_Call] = deque(maxlen=MAX_WAITING)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy waits for no backward pass."""
        return RecentCalls, ()

    def add(self, drawn: Any, t: Tensor | None, data: Tensor | None) -> None:
        """Keeps what was drawn for a call.

        Args:
            drawn: anything.
            t: the host's timesteps, any shape; None if the host drew none.
            data: of the batch; only its place in memory is kept.
        """
        self._calls.append(_Call(t, _place(data), drawn))

    def of_recomputed(self, t: Tensor | None, data: Tensor | None) -> Any:
        """What was drawn for the call that is computed again now.

        Raises:
            ValueError: it cannot be told which call that was.
        """
        same_t = [call for call in reversed(self._calls) if are_equal(call.t, t)]
        # A batch that waits for its backward pass keeps its memory, so the newest call with it is the one.
        same_data = [call for call in same_t if call.place == _place(data)]
        if not same_data and (t is None or len(same_t) != 1):
            raise ValueError(
                "torch.utils.checkpoint computes a training call again, and it cannot be told which: neither"
                " its data nor its timesteps are those of one call. Make both outside of the checkpoint, or"
                " leave preserve_rng_state on"
            )
        return (same_data or same_t)[0].drawn


def _place(data: Tensor | None) -> tuple[int, torch.Size] | None:
    return None if data is None else (data.data_ptr(), data.shape)
