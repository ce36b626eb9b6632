"""The batches of a step. One that cannot be read costs no whole step: the step is left out, on all ranks."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.workers import DataError
from speedit_plugins.trainer.parallel.runtime import Runtime


class StepBatches:
    """Hands out the batches of a step, and keeps the position of the last whole step.

    With several ranks, one that has no batch takes its last batch again. So all ranks reach the end of the
    step, where they exchange whether it counts.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._fault: DataError | None = None
        self._last: Mapping[str, Tensor] | None = None
        self._position: dict[str, Any] | None = None

    def begin(self, loader: ResumableLoader) -> None:
        """Begins a step."""
        self._position = loader.state_dict()

    def next(self, loader: ResumableLoader) -> Mapping[str, Tensor]:
        """The next batch of the step, or after a fault the last one again.

        Raises:
            DataError: a batch cannot be read, and there is no other rank, or it is the first batch of a rank.
        """
        is_first = self._last is None
        if self._fault is None:
            try:
                self._last = next(loader)
            except DataError as fault:
                if self._runtime.world_size == 1:
                    raise
                self._fault = fault
        if is_first:
            # No rank has an earlier batch to go on with, so they agree here, once in a run.
            self._agree()
        assert self._last is not None
        return self._last

    @property
    def broken_rank(self) -> int:
        """This rank if a batch of the step could not be read, -1 otherwise."""
        return -1 if self._fault is None else self._runtime.rank

    def end(self, broken_rank: int) -> None:
        """Ends the step.

        Args:
            broken_rank: the largest `broken_rank` of all ranks.

        Raises:
            DataError: that rank's fault, on all ranks.
        """
        self._raise_fault_of(broken_rank)
        self._position = None

    def _agree(self) -> None:
        self._raise_fault_of(int(self._runtime.maximum([self.broken_rank])[0]))

    def _raise_fault_of(self, rank: int) -> None:
        if rank >= 0:
            said = self._runtime.gather_objects(None if self._fault is None else str(self._fault))
            raise DataError(f"{said[rank]} (on rank {rank})") from self._fault

    def position(self, loader: ResumableLoader) -> dict[str, Any]:
        """The loader's state after the last whole step."""
        return loader.state_dict() if self._position is None else self._position
