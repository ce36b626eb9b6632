"""One training at a time in an experiment's folder: a lock that ends with the process that holds it."""

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from speedit_plugins.files import naming
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.results import LOCK
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.saving.shared_folder import check_shared

# Another process has the lock.
_HELD = (errno.EACCES, errno.EAGAIN)
# The file system has no locks: NFS without its lock service, and some FUSE file systems.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


@contextmanager
def alone_in_folder(config: ExperimentConfig, runtime: Runtime) -> Iterator[None]:
    """A context in which no other training can enter `experiment_dir`. Collective.

    Rank 0 holds the lock for all. The other phases do not ask for it: they write files of their own, and may
    run beside a training. The file stays behind, but a training that is the first one in the folder and ends
    by an error takes it away.

    Raises:
        ValueError: another training is in it (the message has its process, host and start), the folder
            cannot be made, or a rank does not see what rank 0 writes there. All ranks raise it.
        OSError: the lock cannot be written. The other ranks raise a ValueError with its text.
    """
    file: IO[str] | None = None
    is_new = False
    fault: Exception | None = None
    if runtime.is_main:
        try:
            file, is_new = _locked(Path(config.experiment_dir))
        except (ValueError, OSError) as error:
            fault = error
    runtime.raise_together(fault)
    try:
        # Read through the open file: closing another one would end the lock.
        text = None if file is None else _text(file)
        check_shared(Path(config.experiment_dir) / LOCK, text, runtime)
        yield
    except Exception:
        if is_new:
            # While the lock is held: whoever has opened this file meanwhile finds it gone, see `_locked`.
            (Path(config.experiment_dir) / LOCK).unlink(missing_ok=True)
        raise
    finally:
        # Closing ends the lock, as the end of the process does.
        if file is not None:
            file.truncate(0)
            file.close()


def _locked(folder: Path) -> tuple[IO[str], bool]:
    """The open lock file of the folder, with this process in it, and whether there was none before."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            problem = _fault(folder, error)
            raise ValueError(f"experiment_dir needs a folder to write in, got {problem}") from error
        try:
            _enter(file, path)
            if _is_at(path, file):
                return file, is_new
        except (ValueError, OSError):
            file.close()
            raise
        # A training that was refused has taken the file away, and its lock is worth nothing.
        file.close()


def _is_at(path: Path, file: IO[str]) -> bool:
    """Whether the open file is the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _enter(file: IO[str], path: Path) -> None:
    """Locks the open file and writes this process into it."""
    folder = path.parent
    try:
        # A record lock: a forked loading process that outlives the training does not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise ValueError(
                f"another training is in experiment_dir {folder}: {_holder(file)}; wanted another"
                " experiment_dir, or wait until it ends"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, f"cannot lock {path}: {error.strerror}") from error
        say(f"{folder}: its file system has no locks; make sure that no other training writes there")
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    written = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    # Past the text layer, which would try to write again when the file is closed.
    with naming(path):
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), json.dumps(written).encode())
        # On NFS other machines read only what is on the server.
        os.fsync(file.fileno())


def _fault(folder: Path, error: OSError) -> str:
    if folder.is_symlink() and not folder.exists():
        return f"{folder}, a broken link to {os.readlink(folder)}"
    if folder.exists() and not folder.is_dir():
        return f"{folder}, which is a file"
    return f"{folder}: {error.strerror}"


def _holder(file: IO[str]) -> str:
    """Who wrote itself into the lock file; "unknown process" if nobody has yet."""
    try:
        found: dict[str, Any] = json.loads(_text(file))
        return f"process {found['pid']} on {found['host']}, since {found['since']}"
    except (ValueError, KeyError, TypeError):
        return "an unknown process"


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()
