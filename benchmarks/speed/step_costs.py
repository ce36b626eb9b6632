"""Ratios of time and memory between two training steps that take turns in one process."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.spread import Spread


class Side(Protocol):
    """A training on one fixed batch."""

    model: nn.Module

    def step(self) -> float:
        """Makes a step and returns its seconds."""
        ...

    def loss(self) -> Tensor:
        """The loss of the batch, with its graph."""
        ...


def time_ratio(plain: Side, changed: Side, rounds: int) -> Spread:
    """The seconds of a changed step over a plain one, after a first round that does not count."""
    ratios = []
    for number in range(rounds + 1):
        order = (plain, changed) if number % 2 else (changed, plain)
        seconds = {id(side): side.step() for side in order}
        if number:
            ratios.append(seconds[id(changed)] / seconds[id(plain)])
    return Spread.of(ratios)


def kept_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that one forward pass keeps for the backward pass, without the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        found = loss()
    del found
    return sum(kept.values())
