"""Processes that tests start: none is hurried, and none outlives its test.

A wait watches the process itself and what it writes, and has no deadline: on a machine with other work a
process is slow, and slow is not wrong. For a process that hangs there is one limit, pytest's `timeout` in
pyproject.toml. It raises in the waiting test, and leaving the `Job` kills all that the job has started.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

POLL_SECONDS = 0.02
BIN = Path(sys.executable).parent
# A free port. A rank that is told to stop has as long as it needs; torchrun's own patience is 30 s.
TORCHRUN = (BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "--shutdown-timeout", "100000")
_MARK = "SPEEDIT_TEST_JOB"


class Job:
    """A command that runs beside the test, with one thread per process; leaving the block kills it.

    Args:
        command: program and arguments.
        environment: variables beside those of the test.
    """

    def __init__(self, command: Sequence[str | Path], environment: dict[str, str] | None = None) -> None:
        self._mark = uuid.uuid4().hex
        # A file and not a pipe: it is read while the job runs, and never full.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__
        own = {"OMP_NUM_THREADS": "1", _MARK: self._mark, **(environment or {})}
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **own},
        )

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while members := self._members():
            for member in members:
                _kill(member)
            time.sleep(POLL_SECONDS)
        self.process.wait()
        self._output.close()

    @property
    def output(self) -> str:
        """What the job has written to stdout and stderr so far."""
        # At a place of its own: the job writes at the place that a seek would move.
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    @property
    def has_ended(self) -> bool:
        """Whether the command itself has ended."""
        return self.process.poll() is not None

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; fails with the output when the job has ended without it."""
        while not condition():
            # In this order: what holds at the end of the job is seen.
            if self.has_ended and not condition():
                raise AssertionError(f"the job ended with {self.process.returncode}:\n{self.output}")
            time.sleep(POLL_SECONDS)

    def end(self) -> str:
        """Waits for the end of the job; returns its output."""
        self.process.wait()
        return self.output

    def kill_rank(self, rank: int) -> None:
        """Kills the processes of one rank."""
        for member in self._members(f"RANK={rank}"):
            _kill(member)

    def _members(self, *variables: str) -> list[int]:
        """Living processes of the job; torchrun gives each rank a session, so that no group holds them all.

        Args:
            variables: what else their environment has to hold.
        """
        marks, found = {mark.encode() for mark in (f"{_MARK}={self._mark}", *variables)}, []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and marks <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
            except OSError:
                continue  # ended meanwhile, or another user's
        return found


def _kill(process_id: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
