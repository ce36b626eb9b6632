"""Keeps what was read from a large file, so that the next start does not read the file again."""

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from speedit_plugins.trainer.data import kept
from speedit_plugins.trainer.data.listing import TICK_NS

STAMP = "stamp"

Arrays = Mapping[str, np.ndarray]


def indexed(source: Path, name: str, make: Callable[[], Arrays]) -> Arrays:
    """Arrays that `make` reads from a file; the kept ones if the file did not change since.

    A change is another size or modification time. A file that was written within a tick of the clock before
    it was read counts as changed, since a second change might not show. If several processes of one machine
    ask at once, one of them reads.

    Args:
        source: the file that the arrays come from.
        name: what the arrays are; with the source it names the entry, see `kept`.
        make: reads the source; called only if nothing is kept.

    Raises:
        OSError: the source cannot be read.
    """
    key = f"{name} of {source.resolve()}"
    facts = source.stat()
    stamp = np.array([facts.st_size, facts.st_mtime_ns], dtype=np.int64)
    if (arrays := _kept(key, stamp)) is not None:
        return arrays
    with _turn(source):
        # Another process may have read it in the meantime.
        if (arrays := _kept(key, stamp)) is not None:
            return arrays
        started = time.time_ns()
        made = make()
        if facts.st_mtime_ns < started - TICK_NS:
            kept.save(key, {STAMP: stamp, **made})
    return made


def _kept(key: str, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """The kept arrays; None if there are none for this stamp."""
    arrays = kept.load(key)
    if arrays is None or not np.array_equal(arrays.pop(STAMP, np.zeros(0)), stamp):
        return None
    return arrays


@contextlib.contextmanager
def _turn(source: Path) -> Iterator[None]:
    """Inside the block, no other process of this machine is in a block for the same file."""
    with source.open("rb") as file:
        # Some network file systems have no locks. Then several processes do the same work.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
