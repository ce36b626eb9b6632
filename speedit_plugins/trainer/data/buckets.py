"""Buckets: samples of one shape, of which alone a batch can be made.

Dims: N samples, K buckets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def checked_sides(buckets: Any) -> list[tuple[int, int]]:
    """The [height, width] of each bucket as pairs.

    Raises:
        ValueError: no bucket, one that is no pair of ints >= 1, or two of one aspect ratio, of which no
            image would choose the second.
    """
    if not isinstance(buckets, Sequence) or not buckets or not all(map(_is_pair, buckets)):
        raise ValueError(f"buckets need a list of [height, width] in pixels, each >= 1, got {buckets!r}")
    sides = [(height, width) for height, width in buckets]
    for number, (height, width) in enumerate(sides):
        for other in sides[:number]:
            if height * other[1] == other[0] * width:
                raise ValueError(
                    f"buckets need different aspect ratios, got {list(other)} and {[height, width]}"
                )
    return sides


def nearest_buckets(ratios: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """For each image the bucket whose aspect ratio is the nearest on a logarithmic scale, int64 (N,).

    On that scale 2:1 and 1:2 lie equally far from the square. Of two equally near ones it is the wider.

    Args:
        ratios: height over width of each image, (N,), > 0.
        sides: height and width of each bucket, K of them, of different ratios.
    """
    known, numbers = torch.tensor([h / w for h, w in sides], dtype=torch.float64).log().sort()
    return numbers[torch.bucketize(ratios.double().log(), (known[1:] + known[:-1]) / 2)]


def whole_batches(order: Tensor, buckets: Tensor, *, batch_size: int) -> Tensor:
    """`order` rearranged so that each `batch_size` samples in a row lie in one bucket, int64 (usable_size,).

    Follows the order: a sample waits until its bucket has a batch full, and batches come as they fill up.
    What never makes a full one is dropped.

    Args:
        order: a permutation of the samples, int64 (N,).
        buckets: the bucket of each sample, int64 (N,).
        batch_size: >= 1.
    """
    ordered = buckets[order]
    # Stable: within a bucket the positions stay in order.
    groups = ordered.argsort(stable=True).split(_counts(ordered).tolist())
    full = [group[: len(group) // batch_size * batch_size].view(-1, batch_size) for group in groups]
    batches = torch.cat(full)  # positions in `order`, (num_batches, batch_size)
    return order[batches[batches[:, -1].argsort()].flatten()]


def usable_size(buckets: Tensor, *, batch_size: int) -> int:
    """Samples of an epoch that make full batches: what `whole_batches` returns of any order."""
    return int((_counts(buckets) // batch_size).sum()) * batch_size


def _counts(buckets: Tensor) -> Tensor:
    """Samples in each bucket that has some, in the order of the buckets' numbers."""
    return buckets.unique(return_counts=True)[1]


def _is_pair(sides: Any) -> bool:
    return (
        isinstance(sides, Sequence)
        and len(sides) == 2
        and all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    )
