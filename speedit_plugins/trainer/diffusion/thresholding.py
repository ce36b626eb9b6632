"""Keeps a predicted x_0 in the range of the data, [-1, 1], at each step of a sampler.

Source: static and dynamic thresholding, Saharia et al. 2022, arXiv:2205.11487, section 2.3.

Dims: B batch, C channels; "..." is (H, W) for images or (F, H, W) for videos.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Threshold = Callable[[Tensor], Tensor]
"""Maps a predicted x_0 (B, C, ...) to one of the same shape."""


def static(x_0: Tensor) -> Tensor:
    """x_0 clamped to [-1, 1]."""
    return x_0.clamp(-1, 1)


def dynamic(x_0: Tensor, *, percentile: float) -> Tensor:
    """Each sample clamped to [-s, s] and divided by s: s is a quantile of its absolute values, at least 1.

    So values beyond the range push all others inwards, in place of piling up at its ends.

    Args:
        x_0: (B, C, ...).
        percentile: the quantile, in (0, 1].
    """
    s = quantile(x_0.abs().flatten(1), percentile).clamp(min=1.0)  # (B,)
    s = s.view(-1, *[1] * (x_0.ndim - 1))
    return torch.minimum(torch.maximum(x_0, -s), s) / s


def quantile(values: Tensor, share: float) -> Tensor:
    """The quantile of each row, as `torch.quantile` with linear interpolation: (B, N) -> (B,).

    torch's own takes at most 16 million values, a few videos.
    """
    place = share * (values.shape[1] - 1)
    low, high = math.floor(place), math.ceil(place)
    below = values.kthvalue(low + 1, dim=1).values
    return below if low == high else torch.lerp(below, values.kthvalue(high + 1, dim=1).values, place - low)


def threshold_of(*, clip_sample: bool, dynamic_percentile: float | None) -> Threshold | None:
    """What the options of a sampler mean; None leaves x_0 as it is.

    Raises:
        ValueError: both are given, or the percentile is out of range.
    """
    if dynamic_percentile is None:
        return static if clip_sample else None
    if clip_sample:
        raise ValueError("clip_sample has no effect beside dynamic_percentile: needs False, got True")
    if not 0 < dynamic_percentile <= 1:
        raise ValueError(f"dynamic_percentile needs to be in (0, 1], got {dynamic_percentile}")
    return partial(dynamic, percentile=dynamic_percentile)
