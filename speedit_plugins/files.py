"""Files that must be complete: hashes, flushing, whole writes; and what is found in place of weights."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# What libraries raise in place of an OSError when a write fails: safetensors quotes the system's number,
# torch.save only says that it failed.
_QUOTED_NUMBER = re.compile(r"os error (\d+)")
_FAILED_WRITE = re.compile(r"PytorchStreamWriter failed|file write failed|enforce fail at inline_container")


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


def write_whole(path: Path, content: bytes, *, is_flushed: bool = True) -> None:
    """Writes a file with this content, whole or not at all, see `replacing`.

    Raises:
        OSError: the file cannot be written. The message names `path`.
    """
    with replacing(path, is_flushed=is_flushed) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def naming(path: Path, *, also: Path | None = None) -> Iterator[None]:
    """A context for writing `path`: an error of a full disk, which names no file, then names this one.

    Args:
        also: a temporary file. Errors that name it name `path` instead.

    Raises:
        OSError: the block failed to write. The message names `path`.
    """
    try:
        yield
    except OSError as error:
        # Errors about another file keep their message.
        if error.filename not in (None, str(path), str(also)):
            raise
        raise _unwritable(path, error.errno, error.strerror or str(error)) from error
    except Exception as error:
        quoted = _QUOTED_NUMBER.search(str(error))
        if quoted is None and not _FAILED_WRITE.search(str(error)):
            raise
        number = int(quoted[1]) if quoted else errno.EIO
        reason = os.strerror(number) if quoted else "the disk is full, or cannot be written"
        raise _unwritable(path, number, reason) from error


def _unwritable(path: Path, number: int | None, reason: str) -> OSError:
    return OSError(number or errno.EIO, f"cannot write {path}: {reason}")


def usual_mode(folder: Path) -> int:
    """The permissions that a new file in `folder` gets from the user's umask, as `chmod` takes them.

    Raises:
        OSError: the folder cannot be written.
    """
    probe = folder / f".mode_{os.getpid()}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mode & 0o777
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path: Path, *, is_flushed: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`. If the block ends without an error, its file replaces `path`.

    An existing file at `path` stays until the new one is on disk. If the block raises, the temporary file is
    removed.

    Args:
        is_flushed: whether to wait until the file is on disk. For many small files that takes long.

    Raises:
        OSError: the file cannot be written. The message names `path`.
    """
    # In the same folder, because a rename is atomic only within one file system. A killed process leaves the
    # file behind, and the next write to the same path takes it over.
    partial = path.with_name(f"{path.name}.tmp")
    try:
        with naming(path, also=partial):
            # Created here, so that a missing folder raises an OSError, not an error of a library.
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            # Some libraries make the file private. Restore the mode that the user's umask gave it.
            partial.chmod(mode)
            if is_flushed:
                flush(partial)
            partial.replace(path)
            if is_flushed:
                flush(path.parent)
    finally:
        # After a success the file has been renamed, and there is nothing to remove.
        with contextlib.suppress(OSError):
            partial.unlink()


def pickle_fault(error: Exception) -> str:
    """Why torch refuses a file, without its advice to load the file all the same.

    Args:
        error: what `torch.load(..., weights_only=True)` raised.
    """
    text = " ".join(str(error).split())
    if asked := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {asked[1]}, and loading that could run any code"
    if "weights_only" in text:
        return "it is no file of torch.save with tensors and plain values"
    return text or type(error).__name__
