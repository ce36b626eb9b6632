"""Checkpoints that are written while the training goes on.

A save copies what it writes into memory of its own, and the training goes on. A thread of each rank gathers
and writes the copies, by the functions of a save that the training waits for. Its collectives are those of a
second process group.

torch, the hashes and the files leave Python's lock to the training while they work, and so does safetensors
from 0.8 on. A process would need the copies in shared memory, and could outlive the training.
"""

import itertools
from importlib.metadata import version
from pathlib import Path

from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.checkpoints.background import Background
from speedit_plugins.trainer.checkpoints.best import Best, note_best
from speedit_plugins.trainer.checkpoints.names import folder_name
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.interrupt import WRITER
from speedit_plugins.trainer.training.saving.held import Held
from speedit_plugins.trainer.training.saving.saves import Saves
from speedit_plugins.trainer.training.saving.staging import Staging

# Earlier ones keep Python's lock while they write, so the training would stand still.
_SAFETENSORS = (0, 8)
# After so long a wait a line says what it is for.
_SILENT_SECONDS = 1.0
# How long a rank waits for its own part of a save that failed on another one. Most failures reach all ranks.
_FAILURE_SECONDS = 10.0


class BackgroundSaves(Saves):
    """Writes checkpoints on a thread, while the training goes on. Two are never written at once.

    Raises:
        ValueError: the installed safetensors would stop the training.
    """

    def __init__(self, config: ExperimentConfig, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        if _release("safetensors") < _SAFETENSORS:
            raise ValueError(
                f"async_save: safetensors {version('safetensors')} stops the training while it writes; wanted"
                " 0.8 or later"
            )
        self._apart = runtime.apart(config.distributed_timeout_seconds)
        self._background = Background(WRITER)
        self._staging = Staging(is_main=runtime.is_main)
        self._is_told = False
        # The failure after which the ranks' threads are at different places. Equal on all ranks.
        self._lost: str | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a save failed on this rank, and nobody was told."""
        return self._background.fault is not None and not self._is_told

    def save(self, held: Held) -> Path:
        """Copies what is written, and begins to write it. The save before it is done, see `wait`."""
        assert not self._background.is_busy
        copied = self._staging.copied(held)
        self.step = held.step
        self._background.start(lambda: self._finish(copied))
        return self.folder / folder_name(held.step)

    def wait(self) -> None:
        if self._lost is None:
            self._settle_together()
        self.raise_failure()

    def settle(self) -> None:
        if self._lost is not None:
            # A rank that failed may have left this one's thread waiting for it.
            return
        self._settle()
        if self.has_failed:
            self._is_told = True
            # Every rank has the other failures.
            if self._runtime.is_main or isinstance(self._background.fault, _AloneError):
                say(str(self._background.fault))

    def raise_failure(self) -> None:
        if self._lost is not None:
            raise CheckpointError(self._lost)
        if self._background.is_busy:
            self._background.wait(_FAILURE_SECONDS)
        fault = self._background.fault
        said = self._runtime.gather_objects(
            (None if fault is None else str(fault), isinstance(fault, _AloneError), self._is_told)
        )
        texts = [text for text, *_ in said if text is not None]
        if not texts:
            return
        self.step = -1
        if len(texts) < len(said) or any(is_alone for _, is_alone, _ in said):
            self._lost = texts[0]
        # Otherwise it ended at the same place on every rank, and the next save may succeed.
        self._background.fault, self._is_told = None, False
        if self._lost is not None or not all(is_told for *_, is_told in said):
            raise CheckpointError(texts[0]) from fault

    def _settle_together(self) -> None:
        """Waits until all ranks are done with their parts, or one has failed: others may wait for it."""
        for number in itertools.count():
            is_busy = not self._background.wait(_SILENT_SECONDS)
            has_failed = self._background.fault is not None
            is_busy, has_failed = map(bool, self._runtime.maximum([is_busy, has_failed]))
            if has_failed or not is_busy:
                return
            if number == 0:
                self._say_wait()

    def _settle(self) -> None:
        """Waits for this rank's part."""
        if not self._background.wait(_SILENT_SECONDS):
            self._say_wait()
            self._background.wait()

    def _say_wait(self) -> None:
        if self._runtime.is_main:
            say(f"waiting for {self.folder / folder_name(self.step)}, which is being written")

    def _note(self, best: Best) -> None:
        # After the checkpoint is there.
        self._background.start(lambda: note_best(self.folder, best, self._apart))

    def _finish(self, held: Held) -> None:
        """Writes a checkpoint, on the thread."""
        try:
            self.last = self._write(held, self._apart)
        except CheckpointError:
            raise
        except Exception as error:
            path, text = self.folder / folder_name(held.step), str(error) or type(error).__name__
            where = f" on rank {self._runtime.rank}" if self._runtime.world_size > 1 else ""
            raise _AloneError(f"cannot write checkpoint {path}{where}: {text}") from error


class _AloneError(CheckpointError):
    """A rank failed between the exchanges of a save, in which the others hear of a failure."""


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)
