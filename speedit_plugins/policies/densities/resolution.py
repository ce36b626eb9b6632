"""Shifts by resolution: how much noisier a law becomes for larger data, by published rules.

Dims: C channels, F frames, H height, W width, N tokens.
"""

import math
from collections.abc import Callable

from speedit_plugins.registry import Registry

# The shift s for the shape of one sample: (C, H, W), (C, F, H, W), or (N, C) for a sequence.
ShiftOfGrid = Callable[[tuple[int, ...]], float]

RESOLUTIONS = Registry("shift by resolution", "speedit_plugins.policies")


def flux(
    *,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    patch_size: int = 2,
    frames: bool = False,
) -> ShiftOfGrid:
    """s = e^m, where m is linear in the tokens of an image: `base_shift` at `base_tokens`, and so on.

    Source: the FLUX repository (`get_lin_function`). Open-Sora 2.0 multiplies by sqrt(F), see `frames`.

    Args:
        base_shift: m at `base_tokens`, finite.
        max_shift: m at `max_tokens`, finite. Larger images go on along the line.
        base_tokens: >= 1.
        max_tokens: above `base_tokens`.
        patch_size: edge of a token in latent pixels, >= 1. A sequence has its tokens already.
        frames: multiply s by the square root of the number of frames.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> shift = flux()
        >>> round(shift((16, 32, 32)), 4), round(shift((16, 128, 128)), 4)  # e^0.5 and e^1.15
        (1.6487, 3.1582)
    """
    if not (1 <= base_tokens < max_tokens and patch_size >= 1 and math.isfinite(base_shift + max_shift)):
        raise ValueError(
            "flux needs 1 <= base_tokens < max_tokens, patch_size >= 1 and finite shifts, got"
            f" {base_tokens}, {max_tokens}, {patch_size}, {base_shift} and {max_shift}"
        )
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)

    def shift(shape: tuple[int, ...]) -> float:
        num_frames, area = _frames_and_area(shape)
        tokens = area if len(shape) == 2 else area / patch_size**2
        return math.exp(base_shift + slope * (tokens - base_tokens)) * _root(num_frames, frames)

    return shift


def pixels(*, base: int, frames: bool = False) -> ShiftOfGrid:
    """s = sqrt(pixels / base): noise hides an image with more pixels of the same picture less.

    Source: Esser et al. 2024, arXiv:2403.03206, equation 23.

    Args:
        base: H * W for which s is 1, as the model sees it (latents count their own pixels), >= 1.
        frames: multiply s by the square root of the number of frames.

    Raises:
        ValueError: `base` < 1.

    Example:
        >>> pixels(base=32 * 32)((4, 64, 64))
        2.0
    """
    if base < 1:
        raise ValueError(f"a shift by pixels needs base >= 1, got {base}")

    def shift(shape: tuple[int, ...]) -> float:
        num_frames, area = _frames_and_area(shape)
        return math.sqrt(area / base) * _root(num_frames, frames)

    return shift


def dimension(*, base: int = 4096) -> ShiftOfGrid:
    """s = sqrt(values / base), where values are all numbers of a sample: tokens times channels.

    Source: Zheng et al. 2025, arXiv:2510.11690 (RAE). Its 16 x 16 x 768 features have s = 6.93.

    Args:
        base: number of values for which s is 1, >= 1.

    Raises:
        ValueError: `base` < 1.

    Example:
        >>> round(dimension()((768, 16, 16)), 2)
        6.93
    """
    if base < 1:
        raise ValueError(f"a shift by dimension needs base >= 1, got {base}")
    return lambda shape: math.sqrt(math.prod(shape) / base)


def _frames_and_area(shape: tuple[int, ...]) -> tuple[int, int]:
    """F and H * W of (C, H, W) or (C, F, H, W); 1 and N of (N, C)."""
    if len(shape) not in (2, 3, 4):
        raise ValueError(
            "a shift by resolution needs data (B, C, H, W), (B, C, F, H, W) or (B, N, C), got"
            f" {len(shape) + 1} dimensions"
        )
    if len(shape) == 2:
        return 1, shape[0]
    return (shape[1] if len(shape) == 4 else 1), shape[-2] * shape[-1]


def _root(num_frames: int, counts: bool) -> float:
    return math.sqrt(num_frames) if counts else 1.0


for _rule in (flux, pixels, dimension):
    RESOLUTIONS.register_module(name=_rule.__name__, module=_rule)
