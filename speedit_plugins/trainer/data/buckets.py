"""Aspect-ratio buckets: groups of samples with the same shape, as all samples of a batch must have one shape.

Dims: N samples, K buckets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def checked_sides(buckets: Any) -> list[tuple[int, int]]:
    """The (height, width) of each bucket, in pixels.

    Raises:
        ValueError: `buckets` is empty, an entry is not a pair of ints >= 1, or two buckets have the same
            aspect ratio. No image would ever go to the second of the two.
    """
    if not isinstance(buckets, Sequence) or not buckets or not all(map(_is_pair, buckets)):
        raise ValueError(f"buckets must be a list of [height, width] in pixels, each >= 1, got {buckets!r}")
    sides = [(height, width) for height, width in buckets]
    for number, (height, width) in enumerate(sides):
        for other in sides[:number]:
            if height * other[1] == other[0] * width:
                raise ValueError(
                    f"buckets must have different aspect ratios, got {list(other)} and {[height, width]}"
                )
    return sides


def nearest_buckets(ratios: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Index of the bucket with the nearest aspect ratio for each image, int64 (N,).

    Distances are measured on a logarithmic scale, where 2:1 and 1:2 are equally far from the square. A tie
    goes to the wider bucket.

    Args:
        ratios: height / width of each image, (N,), > 0.
        sides: (height, width) of each of the K buckets; no two have the same ratio.
    """
    known, numbers = torch.tensor([h / w for h, w in sides], dtype=torch.float64).log().sort()
    return numbers[torch.bucketize(ratios.double().log(), (known[1:] + known[:-1]) / 2)]


def whole_batches(order: Tensor, buckets: Tensor, *, batch_size: int) -> Tensor:
    """Rearranges `order` so that every batch holds samples of one bucket, int64 (usable_size,).

    Goes through `order` and collects samples per bucket. A batch is emitted as soon as its bucket has
    `batch_size` samples. Samples left over at the end are dropped.

    Args:
        order: a permutation of the samples, int64 (N,).
        buckets: bucket index of each sample, int64 (N,).
        batch_size: >= 1.
    """
    ordered = buckets[order]
    # A stable sort keeps the positions within a bucket in order.
    groups = ordered.argsort(stable=True).split(_counts(ordered).tolist())
    full = [group[: len(group) // batch_size * batch_size].view(-1, batch_size) for group in groups]
    batches = torch.cat(full)  # positions in `order`, (num_batches, batch_size)
    return order[batches[batches[:, -1].argsort()].flatten()]


def usable_size(buckets: Tensor, *, batch_size: int) -> int:
    """Number of samples in full batches per epoch: the length of what `whole_batches` returns."""
    return int((_counts(buckets) // batch_size).sum()) * batch_size


def _counts(buckets: Tensor) -> Tensor:
    """Number of samples in each non-empty bucket, in order of bucket index."""
    return buckets.unique(return_counts=True)[1]


def _is_pair(sides: Any) -> bool:
    return (
        isinstance(sides, Sequence)
        and len(sides) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    )
