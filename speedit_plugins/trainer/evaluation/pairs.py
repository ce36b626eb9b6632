"""Metrics of pairs of images: a fill, and the image in which the hole was.

Dims: B images, C channels, H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

# Side and standard deviation of the SSIM's window, and its two constants. Source: Wang et al. 2004, section
# III-C, doi:10.1109/TIP.2003.819861.
WINDOW, WINDOW_STD, K1, K2 = 11, 1.5, 0.01, 0.03
_WHITE = 255.0
# Mean square of a rounding error, uniform in [-1/2, 1/2].
_ROUNDING = 1 / 12

Measure = Callable[[Tensor, Tensor, Tensor], Tensor]


def psnr(fills: Tensor, originals: Tensor, holes: Tensor) -> Tensor:
    """10 log10(255^2 / mean squared error) in decibels, (B,), of whole images.

    An error below that of rounding to 8 bits counts as that one: equal images have 58.9 dB.

    Args:
        fills: uint8 (B, H, W, C).
        originals: uint8 (B, H, W, C).
        holes: bool (B, H, W); not used.
    """
    error = (fills.double() - originals.double()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(_WHITE**2 / error.clamp(min=_ROUNDING))


def ssim(fills: Tensor, originals: Tensor, holes: Tensor) -> Tensor:
    """Structural similarity in [-1, 1], (B,), averaged over channels and the windows inside the image.

    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861, with the Gaussian window.

    Args:
        fills: uint8 (B, H, W, C).
        originals: uint8 (B, H, W, C).
        holes: bool (B, H, W); not used.

    Raises:
        ValueError: the images are smaller than a window.
    """
    check_window(*fills.shape[1:3])
    places = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    bell = torch.exp(-(places**2) / (2 * WINDOW_STD**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def local(values: Tensor) -> Tensor:
        return functional.conv2d(values, window)

    # Each channel as an image of its own: (B C, 1, H, W).
    x, y = (images.permute(0, 3, 1, 2).double().flatten(0, 1).unsqueeze(1) for images in (fills, originals))
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    covariance = local(x * y) - mean_x * mean_y
    c1, c2 = (K1 * _WHITE) ** 2, (K2 * _WHITE) ** 2
    alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    found = alike / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return found.flatten(1).mean(dim=1).view(len(fills), -1).mean(dim=1)


def check_window(height: int, width: int) -> None:
    """Nothing, if images of this size have room for a window of `ssim`.

    Raises:
        ValueError: they are smaller.
    """
    if min(height, width) < WINDOW:
        raise ValueError(f"ssim needs images of {WINDOW} x {WINDOW} pixels or more, got {height} x {width}")


def hole_error(fills: Tensor, originals: Tensor, holes: Tensor) -> Tensor:
    """Mean absolute error inside the hole, in grey levels of 255, (B,).

    Args:
        fills: uint8 (B, H, W, C).
        originals: uint8 (B, H, W, C).
        holes: bool (B, H, W), none of them empty.
    """
    inside = holes.unsqueeze(-1).double()
    error = ((fills.double() - originals.double()).abs() * inside).sum(dim=(1, 2, 3))
    return error / (inside.sum(dim=(1, 2, 3)) * fills.shape[3])


PAIRED: dict[str, Measure] = {"psnr": psnr, "ssim": ssim, "hole_error": hole_error}
