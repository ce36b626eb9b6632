"""Copies of a model with other tensors in the place of its own."""

import copy
from collections.abc import Callable

from torch import Tensor, nn


def copy_with(
    model: nn.Module, *, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]
) -> nn.Module:
    """A deep copy of a model for which no tensor of it is copied.

    Args:
        model: its parameters keep their `requires_grad`, and those that are shared stay so.
        parameter: makes the copy's parameter of the model's.
        buffer: makes the copy's buffer of the model's.
    """
    # What the memo of a deep copy holds is taken for already copied.
    memo: dict[int, object] = {
        id(own): nn.Parameter(parameter(own), requires_grad=own.requires_grad) for own in model.parameters()
    }
    memo |= {id(own): buffer(own) for own in model.buffers()}
    return copy.deepcopy(model, memo)
