"""The files below a folder and what was read from each, from an index that is kept between runs.

Dims: N files.
"""

import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speedit_plugins.trainer.data import kept
from speedit_plugins.trainer.data.folders import Walk
from speedit_plugins.trainer.data.strings import Strings

# Fewer files are read again at every start: listing them takes a tenth of a second.
KEPT_FROM = 10_000
# A file system's clock may tick this slowly. A change within a tick of the index may not show.
TICK_NS = 2 * 10**9
# Calls to a network's file system that wait at once.
_NUM_THREADS = 16
_CHUNK = 1000


@dataclass(frozen=True)
class Listing:
    """The files below a folder: those of a folder first, then its subfolders, each sorted by name.

    Args:
        root: the resolved folder.
        names: paths relative to `root`, N.
        folders: the same of `root` itself, "", and all folders below it.
        left_out: number of other files by suffix; hidden ones are not counted.
    """

    root: Path
    names: Strings
    folders: Strings
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Stamps:
    """Sizes in bytes and times of the last change in nanoseconds, int64 (N,); size -1 is a missing file."""

    sizes: np.ndarray
    times: np.ndarray

    def missing(self) -> list[int]:
        """Indices of the files that are missing."""
        return np.flatnonzero(self.sizes < 0).tolist()


def list_files(root: Path, *, suffixes: Sequence[str], follow_links: bool) -> Listing:
    """Lists a folder, from the kept index if no folder at or below `root` was written since.

    Raises:
        ValueError: see `Walk.entries`.
        OSError: the system fails to read a folder.
    """
    root = root.resolve()
    key = f"listing of {root}, links {follow_links}, {' '.join(suffixes)}"
    if (found := _kept_listing(root, key)) is not None:
        return found
    walk = Walk(root, follow_links=follow_links, suffixes=suffixes)
    started = time.time_ns()
    names = Strings(_relative(walk.files(str(root)), root))
    listing = Listing(root, names, Strings(_relative(walk.seen, root)), dict(sorted(walk.left_out.items())))
    if len(names) >= KEPT_FROM:
        arrays = {
            **names.arrays("names"),
            **listing.folders.arrays("folders"),
            **Strings(list(listing.left_out)).arrays("left_out"),
            "counts": np.array(list(listing.left_out.values()), dtype=np.int64),
            "folder_times": np.array(list(walk.seen.values()), dtype=np.int64),
            "started": np.array(started),
        }
        kept.save(key, arrays)
    return listing


def stamps_of(base: Path, names: Strings, *, are_folders: bool = False) -> Stamps:
    """Size and time of each file, or of each folder; names are relative to `base`.

    Raises:
        OSError: the system fails to look at a file that may be there.
    """
    prefix = f"{base}{os.sep}"
    sizes, times = np.full(len(names), -1, dtype=np.int64), np.zeros(len(names), dtype=np.int64)

    def look(start: int) -> None:
        for index in range(start, min(start + _CHUNK, len(names))):
            try:
                found = os.stat(os.path.join(prefix, names[index]))
            # ValueError: a NUL in a name.
            except (FileNotFoundError, NotADirectoryError, ValueError):
                continue
            if stat.S_ISDIR(found.st_mode) == are_folders:
                sizes[index], times[index] = found.st_size, found.st_mtime_ns

    _in_threads(look, len(names))
    return Stamps(sizes, times)


def facts_of(base: Path, names: Strings, stamps: Stamps, *, what: str, read: Callable[[int], str]) -> Strings:
    """What `read` returns for each file: kept if neither size nor time of the file changed, else read again.

    Args:
        base: the folder that names are relative to.
        names: the files.
        stamps: their sizes and times.
        what: name of the facts, such as "captions"; each name has one list of files at a time.
        read: the fact about the file at an index; called from several threads. Its errors pass unchanged. An
            empty text is not kept.
    """
    if len(names) < KEPT_FROM:
        return Strings([read(index) for index in range(len(names))])
    key = f"{what} of {base.resolve()}"
    started = time.time_ns()
    texts: list[str | None] = _known_facts(kept.load(key) or {}, names, stamps)
    unknown = [index for index, text in enumerate(texts) if text is None]

    def fill(start: int) -> None:
        for index in unknown[start : start + _CHUNK]:
            texts[index] = read(index)

    _in_threads(fill, len(unknown))
    facts = Strings([str(text) for text in texts])
    if unknown:
        arrays = {"sizes": stamps.sizes, "times": stamps.times, "started": np.array(started)}
        kept.save(key, {**names.arrays("names"), **facts.arrays("facts"), **arrays})
    return facts


def _kept_listing(root: Path, key: str) -> Listing | None:
    """The kept listing; None without one, or if a folder was written after it was made."""
    arrays = kept.load(key)
    if arrays is None:
        return None
    folders = Strings.from_arrays("folders", arrays)
    stamps = stamps_of(root, folders, are_folders=True)
    if (stamps.times != arrays["folder_times"]).any() or stamps.missing():
        return None
    if (stamps.times > arrays["started"] - TICK_NS).any():
        return None
    left_out = zip(Strings.from_arrays("left_out", arrays), arrays["counts"].tolist(), strict=True)
    return Listing(root, Strings.from_arrays("names", arrays), folders, dict(left_out))


def _known_facts(arrays: Mapping[str, np.ndarray], names: Strings, stamps: Stamps) -> list[str | None]:
    """The kept fact about each file; None if it is unknown or the file changed."""
    if not arrays:
        return [None] * len(names)
    old_names, facts = Strings.from_arrays("names", arrays), Strings.from_arrays("facts", arrays)
    rows = np.arange(len(names))
    if names != old_names:
        found = {name: row for row, name in enumerate(old_names)}
        rows = np.array([found.get(name, -1) for name in names], dtype=np.int64)
    is_same = (arrays["sizes"][rows] == stamps.sizes) & (arrays["times"][rows] == stamps.times)
    is_same &= (rows >= 0) & (stamps.times <= arrays["started"] - TICK_NS)
    return [
        facts[row] or None if same else None
        for row, same in zip(rows.tolist(), is_same.tolist(), strict=True)
    ]


def _in_threads(work: Callable[[int], None], size: int) -> None:
    """Calls `work` with the start of every chunk of `size` items; raises the first error."""
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        list(threads.map(work, range(0, size, _CHUNK)))


def _relative(paths: Iterable[str], root: Path) -> list[str]:
    """The paths below `root`, which all start with it, relative to it; "" for `root` itself."""
    length = len(str(root).rstrip(os.sep)) + 1
    return [path[length:] for path in paths]
