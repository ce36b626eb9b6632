"""What is measured every so many steps of a training: grids, validation, evaluation.

None of it changes the training: a measurement sees the averaged weights, and draws from generators of its
own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.logging.tracking import Tracker
from speedit_plugins.trainer.parallel.runtime import Runtime


class Snapshot:
    """The averaged weights of a step, whole and on the device, with all other tensors of the state dict.

    Both properties are collectives: all ranks ask for the same ones, in the same order. The weights are
    gathered once.

    Args:
        step: number of training steps done.
        gather: the averaged weights by name on rank 0, nothing on other ranks. Collective.
        shapes: shape of each averaged weight, known on all ranks.
        others: buffers and frozen parameters, the same on all ranks.
    """

    def __init__(
        self,
        step: int,
        gather: Callable[[], Mapping[str, Tensor]],
        shapes: Mapping[str, Sequence[int]],
        others: Mapping[str, Tensor],
        runtime: Runtime,
    ) -> None:
        self.step = step
        self._gather, self._shapes, self._others, self._runtime = gather, shapes, others, runtime

    @cached_property
    def on_main(self) -> dict[str, Tensor]:
        """The weights on rank 0, nothing on other ranks."""
        averages = self._gather()
        return self._on_device({**self._others, **averages}) if self._runtime.is_main else {}

    @cached_property
    def everywhere(self) -> dict[str, Tensor]:
        """The weights on every rank."""
        held = self.on_main
        if self._runtime.world_size == 1:
            return held
        whole = self._on_device(self._others)
        for name, shape in self._shapes.items():
            whole[name] = held[name] if held else torch.empty(tuple(shape), device=self._runtime.device)
            self._runtime.broadcast(whole[name])
        return whole

    def _on_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self._runtime.device) for name, value in tensors.items()}


@dataclass(frozen=True)
class Measured:
    """What a measurement found. Only rank 0's counts.

    Args:
        row: for metrics.jsonl and the boards.
        scores: what `keep_best` may name; lower is better.
        pictures: image files for the boards, by name: PNG, or GIF where they move.
    """

    row: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    pictures: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True)
class Periodic:
    """A measurement that all ranks take together, at the multiples of `every` steps.

    Args:
        key: the config's key that asks for it.
        every: steps between measurements, >= 1.
        measure: takes it.
    """

    key: str
    every: int
    measure: Callable[[Snapshot], Measured]


def take(
    periodic: Sequence[Periodic], snapshot: Snapshot, tracker: Tracker, runtime: Runtime
) -> Mapping[str, float]:
    """Takes these measurements in turn and logs each as soon as it is there. Collective.

    Returns:
        The scores of all of them, on every rank.

    Raises:
        ValueError, OSError, MemoryError: a measurement failed on a rank; all ranks raise.
    """
    scores: dict[str, float] = {}
    for each in periodic:
        found, fault = Measured(), None
        try:
            found = each.measure(snapshot)
            if found.row:
                tracker.log(snapshot.step, found.row)
            if found.pictures:
                tracker.show(snapshot.step, found.pictures)
        # Rank 0 writes what is measured, and the others wait to hear of it.
        except (ValueError, OSError, MemoryError) as error:
            fault = error
        runtime.raise_together(fault)
        scores |= runtime.gather_objects(dict(found.scores))[0]
    return scores
