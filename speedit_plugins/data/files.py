"""Files that must be right on the disk: their hash, and their way to it."""

import hashlib
import os
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
    """Writes beside the target and renames: what stood there before stays until the new file is on disk.

    Raises:
        OSError: it cannot be written; nothing is left beside the target.
    """
    partial = path.with_name(f"{path.name}.tmp")
    try:
        partial.write_bytes(content)
        flush(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)
