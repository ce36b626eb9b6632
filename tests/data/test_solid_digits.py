import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.shapes.solid_digits import HALF_DEPTH, SCALES, SolidDigits


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def voxels(dataset: SolidDigits, index: int) -> Tensor:
    """(R, R, R), over x, y and z."""
    return dataset.load(index, generator())["voxels"][0]


def cloud(dataset: SolidDigits, index: int, seed: int = 0) -> Tensor:
    """Points (3, N) in the data's units."""
    assert dataset.normalization is not None
    return dataset.normalization.invert(dataset.load(index, generator(seed))["points"])


def test_a_turned_solid_is_its_upright_one_looked_up_at_turned_places() -> None:
    turned, upright = SolidDigits(voxel_size=24, seed=3), SolidDigits(voxel_size=96, max_turn_degrees=0)
    angle, scale = turned._poses[11].tolist()
    # The same digit without a turn; its own scale is in the range too.
    _, own = upright._poses[11].tolist()
    fine = voxels(upright, 11) > 0
    coarse = voxels(turned, 11)
    sine, cosine = math.sin(angle), math.cos(angle)
    centres = [(2 * i + 1) / 24 - 1 for i in range(24)]
    agreed = decided = 0
    for i, x in enumerate(centres):
        for j, y in enumerate(centres):
            for k, z in enumerate(centres):
                if abs(float(coarse[i, j, k])) < 1:
                    continue  # on the surface the share of a voxel does not say where its centre is
                # The inverse of the turn about y, then the other scale.
                back = [x * cosine - z * sine, y, x * sine + z * cosine]
                place = [round((value * own / scale + 1) * 48 - 0.5) for value in back]
                inside = all(0 <= p < 96 for p in place) and bool(fine[tuple(place)])
                decided, agreed = decided + 1, agreed + (inside == (coarse[i, j, k] > 0))
    assert (coarse == 1).sum() > 100
    # 8 places decide a voxel of the coarse grid: a corner of the solid may slip between them.
    assert agreed > 0.998 * decided


def test_surface_points_lie_where_the_voxels_end() -> None:
    grids, clouds = SolidDigits(voxel_size=48), SolidDigits(num_points=400)
    for index in (0, 5, 1796):
        solid = grids.load(index, generator())["voxels"]
        near = {
            "full": functional.max_pool3d(solid, 3, stride=1, padding=1)[0],
            "empty": -functional.max_pool3d(-solid, 3, stride=1, padding=1)[0],
        }
        place = ((cloud(clouds, index) + 1) * 24).floor().long()
        assert near["full"][tuple(place)].min() > -1
        assert near["empty"][tuple(place)].max() < 1


def test_points_are_even_over_the_faces_and_the_sides() -> None:
    number = 20_000
    dataset = SolidDigits(num_points=number, max_turn_degrees=0)
    bitmap = dataset._bitmaps[8].tolist()
    cells = edges = 0
    for row in range(32):
        for column in range(32):
            cells += bitmap[row][column]
            for r, c in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
                inside = 0 <= r < 32 and 0 <= c < 32 and bitmap[r][c]
                edges += bitmap[row][column] and not inside
    faces, sides = 2 * cells / 16**2, edges / 16 * 2 * HALF_DEPTH
    expected = faces / (faces + sides)
    _, scale = dataset._poses[8].tolist()
    x, y, z = cloud(dataset, 8) / scale
    front, back = ((z - side * HALF_DEPTH).abs() < 1e-5 for side in (1, -1))
    # 4 sigma of a binomial frequency.
    slack = 4 * math.sqrt(0.25 / number)
    assert_close(float((front | back).double().mean()), expected, atol=slack, rtol=0)
    assert_close(float(front.double().mean()), expected / 2, atol=slack, rtol=0)
    # A point of a face is in a cell of the bitmap, whose rows go down from y = 1 and columns from x = -1.
    row, column = ((1 - y) * 16).floor().clamp(0, 31).long(), ((x + 1) * 16).floor().clamp(0, 31).long()
    on_cells = torch.tensor(bitmap)[row, column]
    # Within rounding of a cell's border it may be counted to the next one.
    assert on_cells[front | back].double().mean() > 0.999
    # On the open sides, the place along a cell's side and the depth have nothing to do with each other.
    for cells_along, is_straight in ((x * 16, y * 16), (y * 16, x * 16)):
        on_side = ~(front | back) & ((is_straight - is_straight.round()).abs() < 1e-3)
        both = torch.stack([cells_along.remainder(1)[on_side], z[on_side]])
        assert torch.corrcoef(both)[0, 1].abs() < 4 / math.sqrt(both.shape[1])
    upper = (y > 0)[front].double().mean()
    assert_close(float(upper), sum(map(sum, bitmap[:16])) / cells, atol=2 * slack, rtol=0)


def test_poses_belong_to_index_and_seed_and_points_to_the_generator() -> None:
    first, again, other = (SolidDigits(num_points=64, seed=seed) for seed in (0, 0, 1))
    assert_close(cloud(first, 7), cloud(again, 7), rtol=0, atol=0)
    assert not torch.equal(cloud(first, 7), cloud(first, 7, seed=1))
    assert not torch.equal(first._poses, other._poses)
    angle, scale = first._poses.unbind(1)
    assert angle.abs().max() <= math.radians(45)
    assert angle.std() > 0.3
    assert scale.min() >= SCALES[0]
    assert scale.max() <= SCALES[1]
    grids = SolidDigits()
    assert torch.equal(voxels(grids, 3), grids.load(3, generator(9))["voxels"][0])


def test_splits_share_poses_labels_and_normalization() -> None:
    whole, train, test = (SolidDigits(num_points=16, split=split) for split in ("all", "train", "test"))
    assert (len(whole), len(train), len(test)) == (1797, 1438, 359)
    assert whole.normalization == train.normalization == test.normalization
    assert_close(cloud(whole, 1440), cloud(test, 2), rtol=0, atol=0)
    assert torch.equal(torch.cat([train.labels, test.labels]), torch.as_tensor(load_digits().target))
    assert train.load(4, generator())["label"] == 4
    assert "label" not in SolidDigits(class_cond=False).load(4, generator())
    assert len({str(dataset.identity()) for dataset in (whole, train, test, SolidDigits(seed=1))}) == 4


def test_solids_stay_inside_the_grid_at_any_turn() -> None:
    dataset = SolidDigits(voxel_size=16, max_turn_degrees=180)
    for index in range(0, 1797, 9):
        solid = voxels(dataset, index)
        assert solid.shape == (16, 16, 16)
        assert solid.min() == -1
        assert solid.max() == 1
        inner = solid[1:-1, 1:-1, 1:-1]
        assert (solid > -1).sum() == (inner > -1).sum()


def test_points_have_mean_0_and_deviation_1_over_the_data() -> None:
    dataset = SolidDigits(num_points=64)
    points = torch.stack([dataset.load(index, generator(index))["points"] for index in range(1797)])
    # The spread between shapes decides: about 1 / sqrt(1797) = 0.024 for the mean of one axis.
    assert points.mean(dim=(0, 2)).abs().max() < 0.03
    assert_close(float(points.std()), 1.0, atol=0.01, rtol=0)


def test_the_loader_makes_batches_of_both_forms() -> None:
    for options, key, shape in (({}, "voxels", (4, 1, 16, 16, 16)), ({"num_points": 8}, "points", (4, 3, 8))):
        dataset = build(DATASETS, {"type": "SolidDigits", **options})
        batch = next(ResumableLoader(dataset, batch_size=4, seed=0))
        assert batch[key].shape == shape
        assert batch["label"].shape == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voxel_size": 4}, "voxel_size >= 8, got 4"),
        ({"num_points": -1}, "num_points >= 0, got -1"),
        ({"split": "val"}, "split in .*got 'val'"),
        ({"max_turn_degrees": 181.0}, r"max_turn_degrees in \[0, 180\], got 181"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(DATASETS, {"type": "SolidDigits", **options})


def test_an_index_outside_is_refused() -> None:
    with pytest.raises(IndexError, match="1797 solids, got index 1797"):
        SolidDigits().load(1797, generator())
