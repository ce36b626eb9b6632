"""Many texts without as many objects."""

from collections.abc import Sequence

import numpy as np


class Strings:
    """Texts in one array: counting references to a million strings makes every forked worker copy them."""

    def __init__(self, texts: Sequence[str]) -> None:
        # Names of files may be no UTF-8 at all.
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        content = self._bytes[self._ends[index] : self._ends[index + 1]].tobytes()
        return content.decode("utf-8", "surrogateescape")
