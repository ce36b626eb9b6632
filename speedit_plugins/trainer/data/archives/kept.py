"""Keeps what was read from a large file beside it, so that the next start does not read the file again."""

import contextlib
import fcntl
import hashlib
import os
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from speedit_plugins.files import write_whole

# Raised when the meaning of kept arrays changes.
VERSION = 1
STAMP = "stamp"

Arrays = Mapping[str, np.ndarray]


def kept(source: Path, name: str, make: Callable[[], Arrays], *, folder: Path | None = None) -> Arrays:
    """Arrays that `make` reads from a file; read from disk if they were kept for the file as it is now.

    They count as those of another file once its size or modification time changes. The file that keeps them
    is hidden and lies beside the source. If that folder cannot be written, it lies in
    `$XDG_CACHE_HOME/speedit`, or `~/.cache/speedit`. If several processes ask at once, one of them reads.

    Args:
        source: the file that the arrays come from.
        name: what the arrays are; with the source it names the file that keeps them.
        make: reads the source; called only if nothing is kept.
        folder: keeps the arrays there; created if it is missing. None keeps them beside the source.

    Raises:
        OSError: the source cannot be read.
    """
    places = [folder] if folder is not None else [source.parent, _cache_folder()]
    stamp = _stamp(source)
    paths = [_path(place, source, name) for place in places]
    if (arrays := _first(paths, stamp)) is not None:
        return arrays
    with _turn(source):
        # Another process may have written it in the meantime.
        if (arrays := _first(paths, stamp)) is not None:
            return arrays
        made = make()
        arrays = {STAMP: stamp, **{key: np.ascontiguousarray(value) for key, value in made.items()}}
        _write(paths, save(arrays))
    return made


def joined(texts: list[str]) -> dict[str, np.ndarray]:
    """Many texts as two arrays: "text" uint8, and "ends" int64 with the end of each."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(each) for each in encoded], dtype=np.int64)
    return {"text": np.frombuffer(b"".join(encoded), dtype=np.uint8), "ends": ends}


def separated(text: np.ndarray, ends: np.ndarray) -> list[str]:
    """The texts that `joined` took."""
    content = text.tobytes()
    starts = [0, *ends.tolist()]
    return [content[a:b].decode("utf-8", "surrogateescape") for a, b in zip(starts, starts[1:], strict=False)]


def _stamp(source: Path) -> np.ndarray:
    facts = source.stat()
    return np.array([VERSION, facts.st_size, facts.st_mtime_ns], dtype=np.int64)


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "speedit"


def _path(folder: Path, source: Path, name: str) -> Path:
    if folder == source.parent:
        return folder / f".{source.name}.{name}.safetensors"
    # Files of one name in several folders.
    place = hashlib.sha256(os.fsencode(source.resolve())).hexdigest()[:16]
    return folder / f"{source.name}.{place}.{name}.safetensors"


def _first(paths: list[Path], stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """The arrays of the first path that has them for this stamp."""
    for path in paths:
        # A file that is damaged, or of something else, is written again.
        with contextlib.suppress(OSError, SafetensorError, KeyError):
            arrays = load_file(path)
            if np.array_equal(arrays.pop(STAMP), stamp):
                return arrays
    return None


def _write(paths: list[Path], content: bytes) -> None:
    reason = ""
    for path in paths:
        # A name of its own: processes of several machines may write at once.
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(partial, content)
            partial.replace(path)
            return
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            reason = reason or str(error)
    message = f"the index of a file is not kept, so that each start reads the file again: {reason}"
    warnings.warn(message, UserWarning, stacklevel=4)


@contextlib.contextmanager
def _turn(source: Path) -> Iterator[None]:
    """Inside the block, no other process of this machine is in a block for the same file."""
    with source.open("rb") as file:
        # Some network file systems have no locks. Then several processes do the same work.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
