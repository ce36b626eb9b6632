"""The loading processes: what they do with signals, and what their faults are called in the training."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from threading import current_thread, main_thread

from speedit_plugins.trainer.exhaustion import is_out_of_memory, out_of_files, out_of_shared_memory

# A killed process closes its connections first, and can be waited for soon after.
_END_SECONDS = 2.0
_USUAL = {
    signal.SIGKILL: "usually because the memory of the machine is full",
    signal.SIGBUS: "usually because the shared memory /dev/shm is full",
}


class DataError(ValueError):
    """A batch cannot be read: a broken sample, or a loading process that ended. The weights are whole."""


def leave_group_signals_to_trainer(worker_id: int) -> None:
    """Moves a worker out of the trainer's process group, so that group signals do not kill it.

    Ctrl-C and a launcher's SIGTERM go to the whole group. The trainer reacts by finishing its step and saving
    a checkpoint; a worker that died meanwhile would make that fail. SIGTERM sent to the worker itself still
    ends it.
    """
    os.setpgid(0, 0)
    # A terminal that closes sends SIGHUP.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def deaths_wait_for_their_batch() -> Iterator[None]:
    """A context for starting workers, after which the death of one raises no error at a random place.

    torch installs a SIGCHLD handler that raises wherever the main thread is, also in the middle of a save.
    Without it a death is found at the next batch that needs the worker.
    """
    if current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)


def sample_fault(error: Exception) -> str:
    """The line for a sample that cannot be loaded."""
    if found := out_of_files(error):
        return found
    if is_out_of_memory(error):
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        return f"no memory for a sample ({problem}): lower data.num_workers or data.prefetch_factor"
    return str(error) or type(error).__name__


def batch_fault(error: BaseException, workers: Sequence[BaseProcess]) -> DataError | None:
    """The fault of the loading processes that made the next batch fail; None if it is another one.

    Args:
        error: what torch raised.
        workers: the loading processes, by number.
    """
    if isinstance(error, DataError) or not isinstance(error, Exception):
        return None
    # Before the death of a worker, which may follow from them.
    if found := out_of_files(error) or out_of_shared_memory(error):
        return DataError(found)
    dead = _first_dead(workers)
    if dead is None:
        return None
    number, code = dead
    what = f"loading process {number} (pid {workers[number].pid})"
    if code >= 0:
        return DataError(f"{what} ended with exit code {code} and no batch")
    name = signal.Signals(-code).name
    usual = _USUAL.get(signal.Signals(-code), "a library crashed in it, or somebody ended it")
    return DataError(
        f"{what} was killed by {name}, {usual}; wanted less for the loading: lower data.num_workers,"
        " data.prefetch_factor or data.batch_size"
    )


def _first_dead(workers: Sequence[BaseProcess]) -> tuple[int, int] | None:
    """Number and exit code of a worker that has ended; waits a moment for one. None if all live."""
    deadline = time.monotonic() + _END_SECONDS
    while workers and time.monotonic() < deadline:
        for number, worker in enumerate(workers):
            if worker.exitcode is not None:
                return number, worker.exitcode
        time.sleep(0.02)
    return None
