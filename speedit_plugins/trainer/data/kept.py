"""What is kept between runs to start faster: arrays in the user's cache folder. Deleting them is safe."""

import contextlib
import hashlib
import os
import re
import time
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from speedit_plugins.files import replacing
from speedit_plugins.trainer.terminal import say

# Changes when the arrays of an entry change their meaning.
_FORMAT = "1"
# What `save` writes before it is whole. A killed process leaves it behind, and no other takes it over.
_PARTIAL = re.compile(r"[0-9a-f]{32}\.[0-9a-f]+(\.tmp)?")
# No write takes as long. A process on another machine may write to the same folder, so its number tells
# nothing.
_LEFT_SECONDS = 24 * 3600


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
    # Processes that write the same entry do not share a temporary file, on two machines either.
    own = path.with_name(f"{path.stem}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(own) as partial, partial.open("wb") as file:
            np.savez(file, key=np.array(f"{_FORMAT} {key}"), **arrays)  # type: ignore[arg-type]  # arrays only
        own.replace(path)
        _remove_left(path.parent)
    except OSError as error:
        say(f"no index of the data is kept for the next start: {error}")


def _remove_left(folder: Path) -> None:
    """Removes the partial files of processes that were killed while they wrote."""
    latest = time.time() - _LEFT_SECONDS
    for path in folder.iterdir():
        if _PARTIAL.fullmatch(path.name):
            # Another process may remove it first.
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < latest:
                    path.unlink()


def _path(key: str) -> Path:
    return cache_folder() / f"{hashlib.sha256(key.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.npz"
