"""Stores many strings in one array."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np


class Strings:
    """A list of strings kept in one byte array.

    With a Python list, each access changes a reference count. That makes every forked worker copy the memory
    pages of all the strings it reads.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        # File names need not be valid UTF-8.
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        content = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return content.decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        # Several times faster than access by index.
        content, ends = self._bytes.tobytes(), self._ends.tolist()
        return (content[start:end].decode("utf-8", "surrogateescape") for start, end in pairwise(ends))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Strings)
            and np.array_equal(self._ends, other._ends)
            and np.array_equal(self._bytes, other._bytes)
        )

    def digest(self, start: int, stop: int) -> bytes:
        """Hash of the strings from `start` to before `stop`, 16 bytes."""
        ends = self._ends[start : stop + 1]
        found = hashlib.blake2b((ends - ends[0]).astype("<i8").tobytes(), digest_size=16)
        found.update(self._bytes[ends[0] : ends[-1]].tobytes())
        return found.digest()

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The two arrays that `from_arrays` takes, under keys that start with `name`."""
        return {f"{name}_bytes": self._bytes, f"{name}_ends": self._ends}

    @classmethod
    def from_arrays(cls, name: str, arrays: Mapping[str, np.ndarray]) -> "Strings":
        """The strings whose `arrays` these are.

        Raises:
            KeyError: one of the two is missing.
        """
        made = cls(())
        made._bytes, made._ends = arrays[f"{name}_bytes"], arrays[f"{name}_ends"]
        return made
