"""Files that must be right on the disk: their hash, and their way to it."""

import contextlib
import hashlib
import os
import secrets
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

    An earlier file at `path` stays until the new one is on the disk. However else the block ends, nothing is
    left beside the target.

    Raises:
        OSError: the file cannot be written; the message names `path`.
    """
    # In the same folder, since a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # Created here, since the libraries that write files report a missing folder in their own words.
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        # Some of them make it private; it follows the user's umask as any new file does.
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # After a success it is renamed already.
        partial.unlink(missing_ok=True)
