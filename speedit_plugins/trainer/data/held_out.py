"""Samples of a dataset that are kept out of the training.

Dims: N samples of the whole dataset.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.data.identity import Identified, Identity
from speedit_plugins.trainer.data.loader import HELD_OUT_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.data.order import ChunkedOrder


class Part:
    """Some samples of a dataset, as a dataset of their own.

    `buckets` and `chunked` are those of the samples, None where the dataset has none. `classes` are the names
    of the whole dataset's classes, empty if it names none. `num_corrupt` counts in the whole dataset, and
    `left_out` has its files that are not used, and the samples that are held out.

    Args:
        whole: the dataset.
        indices: which of its samples, int64.
        num_held_out: samples that are held out of this part.
    """

    def __init__(self, whole: SampleSource, indices: Tensor, *, num_held_out: int = 0) -> None:
        self.whole, self.indices = whole, indices
        buckets: Tensor | None = getattr(whole, "buckets", None)
        self.buckets = None if buckets is None else buckets[indices].contiguous()
        chunked: ChunkedOrder | None = getattr(whole, "chunked", None)
        self.chunked = None if chunked is None else replace(chunked, chunks=chunked.chunks[indices])
        self.classes: tuple[str, ...] = tuple(getattr(whole, "classes", ()))
        self.num_classes: int = getattr(whole, "num_classes", 0)
        self.left_out = {**(getattr(whole, "left_out", None) or {}), "held out": num_held_out}

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int, generator: torch.Generator) -> Mapping[str, Any]:
        """The sample of the whole dataset at `indices[index]`."""
        return self.whole.load(int(self.indices[index]), generator)

    @property
    def num_corrupt(self) -> int | None:
        """Number of damaged files found so far; None if the dataset does not count them."""
        return getattr(self.whole, "num_corrupt", None)


class IdentifiedPart(Part):
    """A part of a dataset that knows what it consists of."""

    def identity(self) -> Identity:
        """That of the whole dataset. Which samples are meant follows from their number and the seed."""
        assert isinstance(self.whole, Identified)
        return self.whole.identity()

    def name(self, index: int) -> str:
        """Name of a sample of the whole dataset, as `identity.differences` asks for it."""
        name = getattr(self.whole, "name", None)
        return f"sample {index}" if name is None else str(name(index))


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
    part = IdentifiedPart if isinstance(dataset, Identified) else Part
    return part(dataset, trained, num_held_out=num_samples), part(dataset, held)
