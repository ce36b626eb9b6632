"""An epoch's order for data that is read fastest in chunks: shards, or groups of rows.

Dims: N samples, K chunks.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChunkedOrder:
    """Shuffles chunks, and the samples within a window of consecutive chunks.

    A window of K or more shuffles all samples, exactly as without chunks. A smaller one has fewer chunks in
    use at a time.

    Args:
        chunks: chunk that each sample is stored in, int64 (N,).
        window: number of chunks whose samples are mixed, >= 1.
    """

    chunks: Tensor
    window: int

    def draw(self, generator: torch.Generator) -> Tensor:
        """A permutation of the samples, int64 (N,)."""
        used, numbers = self.chunks.unique(return_inverse=True)  # (K,), and (N,) in [0, K)
        if self.window >= len(used):
            return torch.randperm(len(numbers), generator=generator)
        places = torch.randperm(len(used), generator=generator)  # (K,)
        shuffled = torch.randperm(len(numbers), generator=generator)
        windows = places[numbers[shuffled]] // self.window  # (N,)
        return shuffled[windows.argsort(stable=True)]

    @property
    def checksum(self) -> int:
        """A number that differs where the order differs."""
        return zlib.crc32(self.chunks.numpy().tobytes(), self.window)
