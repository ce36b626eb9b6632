"""The index of a tar of samples: where the parts of each sample are, so that a sample can be read by number.

Dims: N samples, M members.
"""

import os
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speedit_plugins.trainer.data.archives.index import indexed
from speedit_plugins.trainer.data.strings import Strings

# The key is all up to the first dot of the file's name; then comes the extension. Hidden files have no key.
NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
BLOCK = 512


@dataclass(frozen=True, eq=False)
class TarIndex:
    """Where the parts of the samples of a tar are.

    Attributes:
        keys: name of each sample, unique, in the tar's order.
        extensions: the different extensions, in lower case.
        sample: sample of each member, int64 (M,).
        extension: its number in `extensions`, int64 (M,).
        offset: first byte of its contents in the tar, int64 (M,).
        size: number of its bytes, int64 (M,).
        fault: why the tar is not whole; "" if it is.
    """

    keys: Strings
    extensions: list[str]
    sample: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    fault: str

    def parts(self, extension: str) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size of that part of each sample, two int64 (N,); offset -1 where a sample has none."""
        offset = np.full(len(self.keys), -1, dtype=np.int64)
        size = np.zeros(len(self.keys), dtype=np.int64)
        if extension in self.extensions:
            # Backwards: if a member appears twice, the first one counts.
            rows = np.flatnonzero(self.extension == self.extensions.index(extension))[::-1]
            offset[self.sample[rows]], size[self.sample[rows]] = self.offset[rows], self.size[rows]
        return offset, size

    def repeated(self) -> list[str]:
        """Names of the members that appear twice."""
        pairs = np.stack([self.sample, self.extension], axis=1)
        different, counts = np.unique(pairs, axis=0, return_counts=True)
        return [f"{self.keys[key]}.{self.extensions[kind]}" for key, kind in different[counts > 1].tolist()]


def read_tar_index(path: Path) -> TarIndex:
    """The index of a tar, read from the tar itself or kept from the last time, see `indexed`.

    Raises:
        ValueError: the file is no tar, or compressed.
        OSError: the system fails to read the file.
    """
    arrays = indexed(path, "members", lambda: _scanned(path))
    return TarIndex(
        keys=Strings.from_arrays("keys", arrays),
        extensions=list(Strings.from_arrays("extensions", arrays)),
        sample=arrays["sample"],
        extension=arrays["extension"],
        offset=arrays["offset"],
        size=arrays["size"],
        fault="".join(Strings.from_arrays("fault", arrays)),
    )


def _scanned(path: Path) -> dict[str, np.ndarray]:
    """The index as arrays, from the headers of all members."""
    keys: dict[str, int] = {}
    extensions: dict[str, int] = {}
    rows: list[tuple[int, int, int, int]] = []
    length = path.stat().st_size
    problem, end = "", 0
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                # Contents are filled up to whole blocks.
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                is_whole = member.offset_data + member.size <= length
                if member.isreg() and is_whole and (parts := NAME.fullmatch(member.name)):
                    key = keys.setdefault(parts[1], len(keys))
                    kind = extensions.setdefault(parts[2].lower(), len(extensions))
                    rows.append((key, kind, member.offset_data, member.size))
                tar.members = []  # type: ignore[attr-defined]  # it would keep all of them
    except tarfile.TarError as error:
        if not end:
            hint = "; it is compressed: unpack it once" if _is_compressed(path) else ""
            raise ValueError(f"{path} is no tar: {error}{hint}") from error
        problem = str(error)
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    return {
        **Strings(list(keys)).arrays("keys"),
        **Strings(list(extensions)).arrays("extensions"),
        **dict(zip(("sample", "extension", "offset", "size"), table.T.copy(), strict=True)),
        **Strings([_fault_at(path, end) or problem]).arrays("fault"),
    }


def _fault_at(path: Path, end: int) -> str:
    """What is wrong behind `end`, the end of the last member; "" if nothing is."""
    with path.open("rb") as file:
        file.seek(end)
        marker = file.read(BLOCK)
        if len(marker) < BLOCK:
            return f"it is cut off at byte {os.fstat(file.fileno()).st_size}: the mark of its end is missing"
        if any(marker):
            return f"the header at byte {end} is damaged"
        # After its end a tar is filled up with zeros.
        while block := file.read(2**20):
            if block.strip(b"\0"):
                return f"more data follows its end at byte {end}, as in tars joined by cat; tar -A joins them"
    return ""


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))
