"""What is kept between runs to start faster: arrays in the user's cache folder. Deleting them is safe."""

import hashlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from speedit_plugins.files import replacing
from speedit_plugins.trainer.terminal import say

# Changes when the arrays of an entry change their meaning.
_FORMAT = "1"


def cache_folder() -> Path:
    """`speedit/folders` in $XDG_CACHE_HOME, or in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "speedit" / "folders"


def load(key: str) -> dict[str, np.ndarray] | None:
    """The arrays kept under `key`; None if there are none, or the file is damaged."""
    try:
        with np.load(_path(key), allow_pickle=False) as found:
            arrays = dict(found)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if str(arrays.pop("key", "")) == f"{_FORMAT} {key}" else None


def save(key: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Keeps the arrays under `key`. If the system refuses, it prints a line, and the next start is slow."""
    path = _path(key)
    # Processes that write the same entry do not share a temporary file.
    own = path.with_name(f"{path.stem}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(own) as partial, partial.open("wb") as file:
            np.savez(file, key=np.array(f"{_FORMAT} {key}"), **arrays)  # type: ignore[arg-type]  # arrays only
        own.replace(path)
    except OSError as error:
        say(f"no index of the data is kept for the next start: {error}")


def _path(key: str) -> Path:
    return cache_folder() / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
