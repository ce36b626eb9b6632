"""Samples of a dataset that are kept out of the training.

Dims: N samples of the whole dataset.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.data.loader import HELD_OUT_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.data.order import ChunkedOrder


class Part:
    """Some samples of a dataset, as a dataset of their own.

    `buckets` are those of the samples, None without buckets. `chunked` is how they are stored, None if that
    does not matter. `classes` are the names of the whole dataset's classes, empty if it names none.
    `normalization` is how it scales point clouds, None if it does not. What the whole dataset counts
    (`left_out`, `num_corrupt`) and what it consists of (`identity`, `name`) hold for a part too.

    Args:
        whole: the dataset.
        indices: which of its samples, int64.
    """

    def __init__(self, whole: SampleSource, indices: Tensor) -> None:
        self.whole, self.indices = whole, indices
        buckets: Tensor | None = getattr(whole, "buckets", None)
        self.buckets = None if buckets is None else buckets[indices].contiguous()
        chunked: ChunkedOrder | None = getattr(whole, "chunked", None)
        if chunked is not None:
            chunked = ChunkedOrder(chunked.chunks[indices].contiguous(), chunked.window)
        self.chunked = chunked
        self.classes: tuple[str, ...] = tuple(getattr(whole, "classes", ()))
        self.num_classes = int(getattr(whole, "num_classes", 0))
        has_captions = getattr(whole, "num_captions", 0) or getattr(whole, "captions", None)
        self.num_captions = len(self) if has_captions else 0
        self.normalization = getattr(whole, "normalization", None)
        self.left_out: dict[str, int] = dict(getattr(whole, "left_out", {}))
        for method in ("identity", "name"):
            if hasattr(whole, method):
                setattr(self, method, getattr(whole, method))

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_corrupt(self) -> int:
        """Number of damaged samples of the whole dataset found so far by all workers."""
        return int(getattr(self.whole, "num_corrupt", 0))

    @property
    def max_captions(self) -> int:
        """Largest number of captions that one sample of the whole dataset has; 0 if it does not say."""
        return int(getattr(self.whole, "max_captions", 0))

    def load(self, index: int, generator: torch.Generator) -> Mapping[str, Any]:
        """The sample of the whole dataset at `indices[index]`."""
        return self.whole.load(int(self.indices[index]), generator)


def hold_out(dataset: SampleSource, num_samples: int, *, seed: int) -> tuple[Part, Part]:
    """Splits a dataset into the part to train on and the part held out. Both keep the dataset's order.

    Args:
        dataset: the whole dataset.
        num_samples: samples to hold out, in [1, N).
        seed: decides which ones.

    Raises:
        ValueError: no sample would be left to train on.
    """
    if not 0 < num_samples < len(dataset):
        raise ValueError(
            f"data.held_out_samples needs to be less than the {len(dataset)} samples of the dataset, got"
            f" {num_samples}"
        )
    generator = torch.Generator().manual_seed(stream_seed(seed, HELD_OUT_STREAM))
    order = torch.randperm(len(dataset), generator=generator)
    held, trained = order[:num_samples].sort().values, order[num_samples:].sort().values
    part = Part(dataset, trained)
    part.left_out["held out for validation"] = num_samples
    return part, Part(dataset, held)
