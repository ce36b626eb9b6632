"""Walking data folders: sorted, and never out of the root by a link that nobody allowed."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path


class Walk:
    """Sorted listing of folders below `root` that does not leave it unless `follow_links`.

    Names that begin with a dot and files of other suffixes are left out.

    Args:
        root: a resolved path.
        follow_links: True allows symbolic links that lead out of `root`.
        suffixes: of the files that count, in lower case.
    """

    def __init__(self, root: Path, *, follow_links: bool, suffixes: Sequence[str]) -> None:
        self.root = root
        self.follow_links = follow_links
        self.suffixes = tuple(suffixes)

    def entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Subfolders and files directly in `folder`, as full paths, sorted by name.

        Raises:
            ValueError: one of them is a link that is refused.
        """
        folders: list[str] = []
        files: list[str] = []
        with os.scandir(folder) as listing:
            found = sorted(listing, key=lambda entry: entry.name)
        for entry in found:
            counts = entry.name.lower().endswith(self.suffixes)
            if entry.name.startswith(".") or not (counts or entry.is_dir()):
                continue
            if entry.is_symlink():
                self._check_link(entry.path)
            (folders if entry.is_dir() else files).append(entry.path)
        return folders, files

    def files(self, folder: str) -> Iterator[str]:
        """Files in `folder` and below, depth first, sorted."""
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
