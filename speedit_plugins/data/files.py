"""Files that must be right on the disk: their hash, and their way to it."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents in hexadecimal, read in pieces of 4 MiB.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Returns when a file's contents, or the entries of a folder, are on the disk.

    Raises:
        OSError: the system cannot write them.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """A file of this content, written as in `replacing`.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside the target, for a file that takes its place when the block ends well.

    What stood there before stays until the new file is on disk; whatever ends the block otherwise, nothing is
    left beside the target.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        # Here, since the libraries that write files name a missing folder in errors of their own.
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        # Some of them make it private; it follows the user's umask as any new file does.
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
    finally:
        # Already renamed after success.
        partial.unlink(missing_ok=True)
    flush(path.parent)
