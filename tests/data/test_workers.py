"""Faults of loading processes: each is one line that says what happened and what to lower."""

import errno
import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from speedit_plugins.trainer.data.loader import ResumableLoader, epoch_order
from speedit_plugins.trainer.data.workers import DataError


class Acting:
    """A dataset of 32 samples whose sample 20 does something first."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def __len__(self) -> int:
        return 32

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        if index == 20:
            self._act()
        return {"image": torch.full((4,), float(index)), "label": index}


def failing(error: Exception) -> Callable[[], object]:
    def act() -> None:
        raise error

    return act


def fault_of(act: Callable[[], object], num_workers: int) -> tuple[str, int]:
    """The message of an epoch with sample 20, and the loader's place then, in batches."""
    loader = ResumableLoader(Acting(act), batch_size=4, num_workers=num_workers)

    def epoch() -> None:
        for _ in range(8):
            next(loader)

    with pytest.raises(DataError) as caught:
        epoch()
    loader.close()
    return str(caught.value), loader.state_dict()["offset"] // 4


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks for dead workers every 5 s."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("sample 20 is broken"), "sample 20 is broken"),
        (FileNotFoundError(errno.ENOENT, "No such file", "20.png"), "[Errno 2] No such file: '20.png'"),
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (
            MemoryError(),
            "no memory for a sample (MemoryError): lower data.num_workers or data.prefetch_factor",
        ),
        (
            OSError(errno.EMFILE, "Too many open files", "20.png"),
            f"too many open files at 20.png: the limit of this process is"
            f" {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}; raise it (ulimit -n 65536), or lower"
            " data.num_workers or data.prefetch_factor",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sample_that_cannot_be_loaded_is_one_line(error: Exception, message: str, num_workers: int) -> None:
    said, place = fault_of(failing(error), num_workers)
    assert said == message
    assert place == epoch_order(32, seed=0, epoch=0).tolist().index(20) // 4


@pytest.mark.parametrize(
    ("act", "wanted"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            r"was killed by SIGKILL, usually because the memory of the machine is full; wanted less for the"
            r" loading: lower data\.num_workers, data\.prefetch_factor or data\.batch_size",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGBUS),
            r"was killed by SIGBUS, usually because the shared memory /dev/shm is full; .*",
        ),
        (
            lambda: os.kill(os.getpid(), signal.SIGUSR1),
            r"was killed by SIGUSR1, a library crashed in it.*",
        ),
        (lambda: os._exit(7), r"ended with exit code 7 and no batch"),
        (
            failing(RuntimeError("unable to write to file </torch_7_1>: No space left on device (28)")),
            r"shared memory is full: make /dev/shm larger \(docker run --shm-size\), or lower .*",
        ),
        (failing(RuntimeError("received 0 items of ancdata")), r"too many open files: the limit .*"),
    ],
    ids=["killed", "bus", "ended", "exit", "shm", "ancdata"],
)
def test_a_loading_process_that_ends_is_named(act: Callable[[], object], wanted: str) -> None:
    message, _ = fault_of(act, 2)
    assert re.fullmatch(rf"(loading process [01] \(pid \d+\) )?{wanted}", message), message


def test_a_death_between_batches_is_found_at_a_batch_and_nowhere_else(tmp_path: Path) -> None:
    loader = ResumableLoader(Acting(lambda: None), batch_size=4, num_workers=2, prefetch_factor=1)
    next(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    worker = loader._batches._workers[0]  # type: ignore[union-attr]  # torch has no public name for it
    os.kill(worker.pid, signal.SIGKILL)
    while worker.exitcode is None:
        time.sleep(0.01)
    # What a save does: torch's own handler of SIGCHLD would raise in the middle of it.
    (tmp_path / "file").write_bytes(bytes(10**6))
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert handler in (signal.SIG_DFL, signal.default_int_handler)

    def some() -> None:
        for _ in range(4):
            next(loader)

    with pytest.raises(DataError, match=rf"loading process 0 \(pid {worker.pid}\) was killed by SIGKILL"):
        some()
    # A closed loader starts new processes.
    place = loader.state_dict()["offset"]
    wanted = epoch_order(32, seed=0, epoch=0)[place : place + 4]
    assert torch.equal(next(loader)["label"], wanted)
    loader.close()


def test_an_error_in_a_dataset_keeps_its_traceback() -> None:
    loader = ResumableLoader(Acting(failing(KeyError("mine"))), batch_size=32, num_workers=1)
    with pytest.raises(KeyError, match="Traceback"):
        next(loader)
    loader.close()
