"""Copies of what a checkpoint holds, which the training does not change."""

import copy
from dataclasses import replace

import torch
from torch import Tensor

from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.training.saving.held import Held


class Staging:
    """The memory of the copies. The next save uses it again: new memory is slow at its first use.

    Copies of a CUDA device's tensors are in pinned memory, which the device copies to without the CPU.

    Args:
        is_main: whether this is rank 0, which writes what is not trained.
    """

    def __init__(self, *, is_main: bool) -> None:
        self._is_main = is_main
        self._memory: dict[str, Tensor] = {}

    def copied(self, held: Held) -> Held:
        """The same in memory of its own, until the next call."""
        weights = held.weights
        untrained = weights.untrained if self._is_main else {}
        averages = {
            label: {name: self._slice(f"average/{label}/{name}", part) for name, part in slices.items()}
            for label, slices in weights.averages.items()
        }
        own = replace(
            held,
            weights=replace(
                weights,
                untrained={name: self._copy(f"model/{name}", value) for name, value in untrained.items()},
                trained={name: self._slice(f"model/{name}", part) for name, part in weights.trained.items()},
                averages=averages,
            ),
            moments={name: self._slice(f"moments/{name}", part) for name, part in held.moments.items()},
            state=copy.deepcopy(held.state),
        )
        if torch.cuda.is_initialized():
            # The copies to pinned memory run beside this thread.
            torch.cuda.current_stream().synchronize()
        return own

    def _slice(self, name: str, part: Slice) -> Slice:
        return Slice(part.start, self._copy(name, part.values))

    def _copy(self, name: str, value: Tensor) -> Tensor:
        own = self._memory.get(name)
        if own is None or own.shape != value.shape or own.dtype != value.dtype:
            own = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._memory[name] = own
        return own.copy_(value.detach(), non_blocking=True)
