"""Metrics of pairs, against closed forms and torchmetrics."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.evaluation.pairs import hole_error, psnr, ssim


def pictures(seed: int, *, channels: int = 3, side: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(2, channels, side // 4, side // 4, generator=generator)
    large = torch.nn.functional.interpolate(smooth, scale_factor=4, mode="bilinear")
    return (large * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def test_the_error_in_a_hole_is_that_of_its_pixels_alone() -> None:
    originals = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    fills, holes = originals.clone(), torch.zeros(2, 4, 4, dtype=torch.bool)
    holes[0, :2, :2], holes[1, 0, 0] = True, True
    fills[0, :2, :2] = 110
    fills[1, 0, 0] = torch.tensor([100, 130, 85], dtype=torch.uint8)
    assert hole_error(fills, originals, holes).tolist() == [10.0, 15.0]
    # 4 of 16 pixels differ by 10; one pixel by 30 and 15 in two of its channels.
    errors = torch.tensor([100 * 4 / 16, (900 + 225) / 48], dtype=torch.float64)
    assert_close(psnr(fills, originals, holes), 10 * torch.log10(255**2 / errors))
    assert float(psnr(originals, originals, holes)[0]) == pytest.approx(10 * math.log10(255**2 * 12))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_similarity_is_that_of_torchmetrics(channels: int) -> None:
    metrics = pytest.importorskip("torchmetrics.functional.image")
    fills, originals = pictures(0, channels=channels), pictures(1, channels=channels)
    fills[:, 6:] = originals[:, 6:]
    found = ssim(fills, originals, torch.zeros(2, 24, 24, dtype=torch.bool))
    ours, theirs = (images.permute(0, 3, 1, 2).double() for images in (fills, originals))
    options = {"data_range": 255.0, "return_full_image": True}
    whole = metrics.structural_similarity_index_measure(ours, theirs, **options)[1]
    # It mirrors the image at its sides, and averages over those windows too.
    wanted = whole[..., 5:-5, 5:-5].flatten(1).mean(dim=1)
    # Two ways to sum the same window in float64.
    assert_close(found, wanted.double(), rtol=0, atol=1e-9)
    assert (found < 0.99).all()
    assert_close(ssim(originals, originals, torch.zeros(2, 24, 24, dtype=torch.bool)), torch.ones(2).double())


def test_images_smaller_than_a_window_have_no_similarity() -> None:
    small = torch.zeros(1, 8, 8, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="ssim needs images of 11 x 11 pixels or more, got 8 x 8"):
        ssim(small, small, torch.zeros(1, 8, 8, dtype=torch.bool))
