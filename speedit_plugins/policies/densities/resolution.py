"""Shifts by resolution: how much noisier a law becomes for larger data, by published rules.

Dims: C channels, F frames, H height, W width, N tokens.
"""

import math
from collections.abc import Callable
from functools import partial

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
    frames: str | None = None,
) -> ShiftOfGrid:
    """s = e^m, where m is linear in the tokens of an image: `base_shift` at `base_tokens`, and so on.

    Source: the FLUX repository (`get_lin_function`).

    Args:
        base_shift: m at `base_tokens`, in [-10, 10].
        max_shift: m at `max_tokens`, in [-10, 10]. Larger images go on along the line.
        base_tokens: >= 1.
        max_tokens: above `base_tokens`.
        patch_size: edge of a token in latent pixels, >= 1. A sequence has its tokens already.
        frames: multiply s by the square root of F, see `pixels`.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> shift = flux()
        >>> round(shift((16, 32, 32)), 4), round(shift((16, 128, 128)), 4)  # e^0.5 and e^1.15
        (1.6487, 3.1582)
    """
    _check_frames(frames)
    is_moderate = max(abs(base_shift), abs(max_shift)) <= 10
    if not (1 <= base_tokens < max_tokens and patch_size >= 1 and is_moderate):
        raise ValueError(
            "flux needs 1 <= base_tokens < max_tokens, patch_size >= 1 and shifts in [-10, 10], got"
            f" {base_tokens}, {max_tokens}, {patch_size}, {base_shift} and {max_shift}"
        )
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    start = base_shift - slope * base_tokens
    return partial(_by_tokens, start=start, slope=slope, patch_size=patch_size, frames=frames)


def linear(
    *,
    low: float = 1.0,
    high: float = 3.0,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    patch_size: int = 2,
    frames: str | None = None,
) -> ShiftOfGrid:
    """s linear in the tokens of a frame: `low` at `base_tokens`, `high` at `max_tokens`.

    Source: `get_res_lin_function` of Open-Sora 2.0, which multiplies it by sqrt(F): `frames: second`.

    Args:
        low: s at `base_tokens`, > 0.
        high: s at `max_tokens`, >= `low`. Larger images go on along the line, smaller ones down to 1e-3.
        base_tokens, max_tokens, patch_size, frames: see `flux`.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> shift = linear(frames="second")
        >>> shift((16, 4, 32, 32)), shift((16, 1, 128, 128))  # 1 times the square root of 4 frames, and 3
        (2.0, 3.0)
    """
    _check_frames(frames)
    if not (1 <= base_tokens < max_tokens and patch_size >= 1 and 0 < low <= high < math.inf):
        raise ValueError(
            "linear needs 1 <= base_tokens < max_tokens, patch_size >= 1 and 0 < low <= high, got"
            f" {base_tokens}, {max_tokens}, {patch_size}, {low} and {high}"
        )
    slope = (high - low) / (max_tokens - base_tokens)
    start = low - slope * base_tokens
    return partial(_linear_in_tokens, start=start, slope=slope, patch_size=patch_size, frames=frames)


def pixels(*, base: int, frames: str | None = None) -> ShiftOfGrid:
    """s = sqrt(pixels / base): noise hides an image with more pixels of the same picture less.

    Source: Esser et al. 2024, arXiv:2403.03206, equation 23.

    Args:
        base: H * W for which s is 1, as the model sees it (latents count their own pixels), >= 1.
        frames: multiply s by the square root of F: "second" if the data are (B, C, F, H, W), "first" if they
            are (B, F, C, H, W), as Latte's. None does not.

    Raises:
        ValueError: `base` < 1, or another value for `frames`.

    Example:
        >>> pixels(base=32 * 32)((4, 64, 64))
        2.0
    """
    if base < 1:
        raise ValueError(f"a shift by pixels needs base >= 1, got {base}")
    _check_frames(frames)
    return partial(_by_pixels, base=base, frames=frames)


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
    return partial(_by_dimension, base=base)


def _by_tokens(
    shape: tuple[int, ...], start: float, slope: float, patch_size: int, frames: str | None
) -> float:
    return math.exp(start + slope * _tokens(shape, patch_size)) * _root_of_frames(shape, frames)


def _linear_in_tokens(
    shape: tuple[int, ...], start: float, slope: float, patch_size: int, frames: str | None
) -> float:
    return max(1e-3, start + slope * _tokens(shape, patch_size)) * _root_of_frames(shape, frames)


def _tokens(shape: tuple[int, ...], patch_size: int) -> float:
    return _area(shape) if len(shape) == 2 else _area(shape) / patch_size**2


def _by_pixels(shape: tuple[int, ...], base: int, frames: str | None) -> float:
    return math.sqrt(_area(shape) / base) * _root_of_frames(shape, frames)


def _by_dimension(shape: tuple[int, ...], base: int) -> float:
    return math.sqrt(math.prod(shape) / base)


def _area(shape: tuple[int, ...]) -> int:
    """H * W of an image or a video; N of a sequence (N, C)."""
    if len(shape) not in (2, 3, 4):
        raise ValueError(
            "a shift by resolution needs images (B, C, H, W), videos with five dimensions or sequences"
            f" (B, N, C), got {len(shape) + 1} dimensions"
        )
    return shape[0] if len(shape) == 2 else shape[-2] * shape[-1]


def _check_frames(frames: str | None) -> None:
    if frames not in (None, "first", "second"):
        raise ValueError(f"frames needs 'first', 'second' or null, got {frames!r}")


def _root_of_frames(shape: tuple[int, ...], frames: str | None) -> float:
    """Square root of F; 1 if frames do not count, or there are none."""
    if frames is None or len(shape) != 4:
        return 1.0
    return math.sqrt(shape[0] if frames == "first" else shape[1])


for _rule in (flux, linear, pixels, dimension):
    RESOLUTIONS.register_module(name=_rule.__name__, module=_rule)
