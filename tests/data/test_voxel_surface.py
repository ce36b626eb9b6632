import math

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.trainer.data.shapes.voxel_surface import surface_of_voxels


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_points_are_even_over_the_faces_of_a_block() -> None:
    number = 20_000
    voxels = torch.full((2, 1, 4, 8, 8), -1.0)
    # A block of 2 x 2 x 6 voxels, at x in [-0.5, 0.5], y in [0, 0.5] and z in [-1, 0.5].
    voxels[1, 0, 1:3, 4:6, 0:6] = 0.5
    voxels[0, 0, 0, 0, 0] = 1.0
    points = surface_of_voxels(voxels, number, generator())[1]
    low, high = torch.tensor([-0.5, 0.0, -1.0]), torch.tensor([0.5, 0.5, 0.5])
    areas = [0.5 * 1.5, 1 * 1.5, 1 * 0.5]
    for axis, area in enumerate(areas):
        for end in (low, high):
            share = (points[axis] == end[axis]).double().mean()
            # 4 sigma of a binomial frequency.
            slack = 4 * math.sqrt(0.25 / number)
            assert_close(float(share), area / (2 * sum(areas)), atol=slack, rtol=0)
    assert (points.amin(dim=1) >= low).all()
    assert (points.amax(dim=1) <= high).all()
    assert_close(points.mean(dim=1), (low + high) / 2, atol=0.02, rtol=0)


def test_a_solid_without_a_surface_is_named() -> None:
    voxels = torch.full((3, 1, 4, 4, 4), -1.0)
    voxels[:2, 0, 1, 1, 1] = 1.0
    with pytest.raises(ValueError, match="solid 2 is empty"):
        surface_of_voxels(voxels, 8, generator())
    voxels[1, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="solid 1 has voxels that are NaN"):
        surface_of_voxels(voxels, 8, generator())
    with pytest.raises(ValueError, match=r"\(S, 1, D, H, W\) and at least 1 point, got \(4, 4, 4\)"):
        surface_of_voxels(voxels[0, 0], 8, generator())
