"""Lists data folders in sorted order and refuses symbolic links that lead out of the root."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path


class Walk:
    """Sorted listing of the folders and files below `root`.

    Skips hidden names (a leading dot) and files with other suffixes.

    Args:
        root: a resolved path.
        follow_links: True allows symbolic links that lead out of `root`.
        suffixes: file suffixes to list, in lower case.

    Attributes:
        seen: time of the last change, in nanoseconds, of each folder that was listed.
        left_out: number of files that were not listed, by suffix in lower case. Hidden ones are not counted.
    """

    def __init__(self, root: Path, *, follow_links: bool, suffixes: Sequence[str]) -> None:
        self.root = root
        self.follow_links = follow_links
        self.suffixes = tuple(suffixes)
        self.seen: dict[str, int] = {}
        self.left_out: Counter[str] = Counter()

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Subfolders and files directly in `folder`, as full paths, sorted by name.

        Raises:
            ValueError: an entry is a symbolic link out of the root, to nothing or to a folder above it.
        """
        folders: list[str] = []
        files: list[str] = []
        is_new = folder not in self.seen
        # Before it is read: what is added meanwhile gives the folder a later time.
        self.seen[folder] = os.stat(folder).st_mtime_ns
        with os.scandir(folder) as listing:
            found = sorted(listing, key=lambda entry: entry.name)
        for entry in found:
            if entry.name.startswith("."):
                continue
            if not (entry.name.lower().endswith(self.suffixes) or entry.is_dir()):
                # A folder may be listed twice, and then counts once.
                self.left_out[os.path.splitext(entry.name)[1].lower() or "no suffix"] += is_new
                continue
            if entry.is_symlink():
                self._check_link(entry.path)
            (folders if entry.is_dir() else files).append(entry.path)
        return folders, files

    def files(self, folder: str) -> Iterator[str]:
        """All files in and below `folder`: those of a folder first, then its subfolders, each sorted."""
        folders, files = self.entries(folder)
        yield from files
        for below in folders:
            yield from self.files(below)

    def _check_link(self, link: str) -> None:
        target = Path(os.path.realpath(link))
        if not self.follow_links and not target.is_relative_to(self.root):
            raise ValueError(
                f"the link {link} leads out of the data root {self.root}, to {target}; "
                "follow_links=True allows it"
            )
        if not target.exists():
            raise ValueError(f"the link {link} leads to nothing: {target}")
        if Path(os.path.realpath(os.path.dirname(link))).is_relative_to(target):
            raise ValueError(f"the link {link} leads in a circle, to {target}")
