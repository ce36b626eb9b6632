import math

import pytest
import torch
from torch import Tensor

from speedit_plugins.trainer.logging.rendering import (
    BACKGROUND,
    _reach,
    _render_cloud,
    _turn,
    render_points,
    render_voxels,
)


def ball(side: int = 24, radius: float = 0.7) -> Tensor:
    """Voxels (1, 1, R, R, R) that are 0 at this distance from the middle, and rise by 2 per voxel."""
    place = (torch.arange(side) + 0.5) * 2 / side - 1
    x, y, z = torch.meshgrid(place, place, place, indexing="ij")
    distance = (x.square() + y.square() + z.square()).sqrt()
    return ((radius - distance) * side).clamp(-1, 1)[None, None]


def drawn(picture: Tensor) -> Tensor:
    """Where a picture (P, P, 3) is not background, bool (P, P)."""
    return (picture < BACKGROUND).any(dim=-1)


def middle(picture: Tensor) -> tuple[float, float]:
    """(right, up) of the middle of what is drawn, from the picture's middle."""
    row, column = drawn(picture).nonzero().double().mean(dim=0).tolist()
    half = (len(picture) - 1) / 2
    return column - half, half - row


def test_a_ball_is_a_disk_lit_from_the_upper_left_at_any_angle() -> None:
    pictures = [render_voxels(ball(), azimuth_degrees=angle, size=64)[0] for angle in (0.0, 33.0, 240.0)]
    for picture in pictures:
        seen = drawn(picture)
        rows, columns = seen.any(dim=1).nonzero().flatten(), seen.any(dim=0).nonzero().flatten()
        high, wide = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        assert abs(high - wide) <= 1
        # Partly covered pixels of the outline count whole: half a pixel all around.
        assert seen.sum().item() == pytest.approx(math.pi / 4 * wide * high, rel=0.05)
        light = picture.float().mean(dim=-1)
        assert light[16:26, 20:44].mean() > 1.2 * light[38:48, 20:44].mean()
        assert light[20:44, 16:26].mean() > 1.1 * light[20:44, 38:48].mean()
    # A turned ball is the same ball, up to the grid.
    assert (pictures[0].float() - pictures[1].float()).abs().mean() < 3


@pytest.mark.parametrize("form", ["voxels", "points"])
def test_axes_are_right_up_and_towards_the_viewer(form: str) -> None:
    def shown(axis: int, azimuth: float) -> tuple[float, float]:
        # A block in the middle, which counts twice to the middle of a cloud, and one on one side.
        aside = [8, 8, 8]
        aside[axis] = 14
        places = [(8, 8, 8), (8, 8, 8), tuple(aside)]
        if form == "voxels":
            voxels = torch.full((1, 1, 17, 17, 17), -1.0)
            for x, y, z in places:
                voxels[0, 0, x, y, z] = 1.0
            return middle(render_voxels(voxels, azimuth_degrees=azimuth, size=80)[0])
        cloud = torch.tensor(places, dtype=torch.float32).T[None]
        return middle(render_points(cloud, azimuth_degrees=azimuth, size=80)[0])

    assert shown(0, 0)[0] > 5
    assert shown(0, 180)[0] < -5
    assert shown(1, 0)[1] > 5
    # A quarter of a turn takes z to x, and x to the back. Seen from above, the back is higher up.
    assert shown(2, 90)[0] > 5
    assert shown(0, 90)[1] > 1
    assert shown(0, -90)[1] < -1
    assert shown(2, 0)[1] < -1


def test_no_single_voxel_is_missed() -> None:
    places = torch.randint(32, (40, 3), generator=torch.Generator().manual_seed(0))
    voxels = torch.full((1, 1, 32, 32, 32), -1.0)
    voxels[0, 0, places[:, 0], places[:, 1], places[:, 2]] = 1.0
    picture = drawn(render_voxels(voxels, azimuth_degrees=70, size=96)[0])
    right, up, _ = _turn(70) @ ((2 * places.T + 1) / 32 - 1)
    width = _reach(voxels)[0]
    column, row = (((1 + place / width) * 48).floor().long() for place in (right, -up))
    assert picture[row, column].all()


def test_what_is_near_hides_what_is_far() -> None:
    near, far = torch.tensor([[0.1], [0.2], [0.5]]), torch.tensor([[0.1], [0.2], [-0.5]])
    alone = _render_cloud(near, 64)
    assert torch.equal(_render_cloud(torch.cat([far, near], dim=1), 64), alone)
    assert not torch.equal(_render_cloud(far, 64), alone)
    # The far one is darker.
    assert _render_cloud(far, 64)[drawn(alone)].sum() < alone[drawn(alone)].sum()


def test_empty_solids_and_clouds_at_one_place_have_a_picture() -> None:
    empty = render_voxels(torch.full((1, 1, 8, 8, 8), -1.0), azimuth_degrees=0, size=32)
    assert not drawn(empty[0]).any()
    full = render_voxels(torch.ones(1, 1, 8, 8, 8), azimuth_degrees=45, size=32)
    # The whole cube is in the picture.
    assert drawn(full[0])[8:24, 8:24].all()
    assert not drawn(full[0])[[0, -1]].any()
    assert not drawn(full[0])[:, [0, -1]].any()
    point = render_points(torch.ones(1, 3, 5), azimuth_degrees=0, size=32)
    assert 0 < drawn(point[0]).sum() < 32
