"""Stores many strings in one array."""

from collections.abc import Sequence

import numpy as np


class Strings:
    """A list of strings kept in one byte array.

    With a Python list, each access changes a reference count. That makes every forked worker copy the memory
    pages of all the strings it reads.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        # File names need not be valid UTF-8.
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        content = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return content.decode("utf-8", "surrogateescape")
