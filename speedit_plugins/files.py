"""Files that must be complete on disk: hashes, flushing, and writing a file whole or not at all."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, as 64 hexadecimal digits. The file is read in pieces of 4 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on disk.

    Raises:
        OSError: the path cannot be opened, or the system cannot write it.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file with this content, whole or not at all, see `replacing`.

    Raises:
        OSError: the file cannot be written. The message names `path`.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. If the block ends without an error, its file replaces `path`.

    An existing file at `path` stays until the new one is on disk. If the block raises, the temporary file is
    removed.

    Raises:
        OSError: the file cannot be written. The message names `path`.
    """
    # In the same folder, because a rename is atomic only within one file system. A killed process leaves the
    # file behind, and the next write to the same path takes it over.
    partial = path.with_name(f"{path.name}.tmp")
    try:
        # Created here, so that a missing folder raises the OSError below, not an error of a library.
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        # Some libraries make the file private. Restore the mode that the user's umask gave it.
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
        flush(path.parent)
    except OSError as error:
        # Errors about another file keep their message; a full disk names none.
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno or errno.EIO, f"cannot write {path}: {error.strerror or error}") from error
    finally:
        # After a success the file has been renamed, and there is nothing to remove.
        partial.unlink(missing_ok=True)
