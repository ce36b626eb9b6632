"""Samples of a dataset that are kept out of the training.

Dims: N samples of the whole dataset.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.data.loader import HELD_OUT_STREAM, SampleSource, stream_seed


class Part:
    """Some samples of a dataset, as a dataset of their own.

    `buckets` are those of the samples, None without buckets. `classes` are the names of the whole dataset's
    classes, empty if it names none.

    Args:
        whole: the dataset.
        indices: which of its samples, int64.
    """

    def __init__(self, whole: SampleSource, indices: Tensor) -> None:
        self.whole, self.indices = whole, indices
        buckets: Tensor | None = getattr(whole, "buckets", None)
        self.buckets = None if buckets is None else buckets[indices].contiguous()
        self.classes: tuple[str, ...] = tuple(getattr(whole, "classes", ()))

    def __len__(self) -> int:
        return len(self.indices)

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
    return Part(dataset, trained), Part(dataset, held)
