from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from speedit_plugins.trainer.data.shapes.meshes import surface_points
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.data.shapes.solid_digits import SolidDigits
from speedit_plugins.trainer.logging.shapes import (
    CELL,
    TURN_CELL,
    TURN_FRAMES,
    VIEWS,
    pictures,
    save_obj,
    save_ply,
    save_shapes,
)

NO_SKIMAGE = "the optional package scikit-image makes meshes"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_a_png_has_rows_of_views_and_a_gif_turns_them(tmp_path: Path) -> None:
    data = SolidDigits(voxel_size=8)
    solids = torch.stack([data.load(index, generator())["voxels"] for index in range(3)])
    save_shapes(solids, tmp_path / "some.png", columns=2, titles=["zero", "one"])
    png, gif = Image.open(tmp_path / "some.png"), Image.open(tmp_path / "some.gif")
    # Two rows of samples, with a gap of 2 around each cell, below a line of titles. 128 pixels are for names.
    wide, cells = 128 + 2 * (CELL + 2) + 2, 2 * len(VIEWS) * (CELL + 2) + 2
    band = png.height - cells
    assert (png.width, png.mode) == (wide, "RGB")
    assert 10 <= band <= 30
    assert (gif.n_frames, gif.width) == (TURN_FRAMES, 2 * (TURN_CELL + 2) + 2)
    assert gif.height == band + 2 * (TURN_CELL + 2) + 2
    names, shown = np.split(np.asarray(png)[band:], [128], axis=1)
    # Each view of each row has a name beside it.
    assert all((part != 255).any() for part in np.array_split(names, 2 * len(VIEWS)))
    for view, azimuth in enumerate(VIEWS):
        cell = pictures(solids, azimuth_degrees=azimuth, size=CELL)
        top = 2 + view * (CELL + 2)
        assert (shown[top : top + CELL, 2 : 2 + CELL] == cell[0]).all()
        top = 2 + (len(VIEWS) + view) * (CELL + 2)
        assert (shown[top : top + CELL, 2 : 2 + CELL] == cell[2]).all()
        # No fourth sample.
        assert (shown[top : top + CELL, CELL + 4 : -2] == 255).all()


def test_a_shape_that_is_not_finite_is_a_cross_and_leaves_the_others_alone() -> None:
    data = SolidDigits(num_points=32)
    clouds = torch.stack([data.load(index, generator())["points"] for index in range(3)])
    # The scale is that of the clouds that are shown.
    whole = np.repeat(pictures(clouds[[0, 2]], azimuth_degrees=0, size=40), (2, 1), axis=0)
    clouds[1, 2, 5] = torch.inf
    marked = pictures(clouds, azimuth_degrees=0, size=40)
    assert (marked[[0, 2]] == whole[[0, 2]]).all()
    assert (marked[1][np.arange(40), np.arange(40)] == 96).all()
    assert (marked[1] == 255).sum() == (1600 - 80) * 3
    with pytest.raises(ValueError, match=r"solids \(B, 1, R, R, R\) or clouds \(B, 3, N\), got \(2, 4, 5\)"):
        pictures(torch.zeros(2, 4, 5), azimuth_degrees=0, size=8)


def test_all_clouds_of_a_picture_have_one_scale_which_is_that_of_the_data_if_it_is_known() -> None:
    clouds = torch.stack([torch.randn(3, 64, generator=generator()) for _ in range(2)]) + 5
    clouds[1] = (clouds[1] - 5) * 10 + 5

    def width(shown: np.ndarray) -> int:
        columns = np.flatnonzero((shown != 255).any(axis=(0, 2)))
        return int(columns.max() - columns.min())

    small, large = map(width, pictures(clouds, azimuth_degrees=0, size=100))
    # Balls have a radius of 2 pixels.
    assert abs((small - 4) * 10 - (large - 4)) < 25
    data = Normalization((5.0, 5.0, 5.0), 1.0)
    first, second = (
        pictures(some, azimuth_degrees=0, size=100, normalization=data) for some in (clouds, clouds[:1])
    )
    # Whatever else is in the picture.
    assert (first[0] == second[0]).all()
    assert width(first[0]) > 30
    away = pictures(clouds + 100, azimuth_degrees=0, size=100, normalization=data)
    assert (away == 255).all()


def test_a_ply_holds_the_points(tmp_path: Path) -> None:
    points = torch.randn(3, 50, generator=generator())
    path = tmp_path / "cloud.ply"
    save_ply(points, path)
    head, _, body = path.read_bytes().partition(b"end_header\n")
    assert head.decode().splitlines()[:3] == ["ply", "format binary_little_endian 1.0", "element vertex 50"]
    assert (np.frombuffer(body, dtype="<f4").reshape(50, 3) == points.T.numpy()).all()
    points[0, 0] = torch.nan
    with pytest.raises(ValueError, match="bad.ply is not written: .*NaN"):
        save_ply(points, tmp_path / "bad.ply")
    assert not (tmp_path / "bad.ply").exists()
    with pytest.raises(ValueError, match=r"points \(3, N\), got \(50, 3\)"):
        save_ply(points.T, tmp_path / "bad.ply")


def test_trimesh_reads_the_ply_back(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason="the optional package trimesh reads meshes")
    points = torch.randn(3, 50, generator=generator())
    save_ply(points, tmp_path / "cloud.ply")
    assert_close(surface_points(tmp_path / "cloud.ply", 50, generator(), fit_box=False), points.T)


def test_the_obj_of_a_ball_is_closed_faces_outward_and_has_its_volume(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason=NO_SKIMAGE)
    place = (torch.arange(32) + 0.5) / 16 - 1
    x, y, z = torch.meshgrid(place, place, place, indexing="ij")
    # Its middle is off the grid's, at (0.2, 0, 0).
    distance = ((x - 0.2).square() + y.square() + z.square()).sqrt()
    path = tmp_path / "ball.obj"
    save_obj(0.6 - distance[None], path)
    rows = [line.split() for line in path.read_text().splitlines()]
    vertices = np.array([row[1:] for row in rows if row[0] == "v"], dtype=float)
    triangles = np.array([row[1:] for row in rows if row[0] == "f"], dtype=int) - 1
    radii = np.linalg.norm(vertices - [0.2, 0, 0], axis=1)
    # The distance is interpolated along an edge of a voxel: an error of at most voxel^2 / (8 radius).
    assert np.abs(radii - 0.6).max() < (1 / 16) ** 2 / (8 * 0.6)
    edges = Counter(tuple(pair) for t in triangles.tolist() for pair in zip(t, (*t[1:], t[0]), strict=True))
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)
    a, b, c = (vertices[triangles[:, corner]] for corner in range(3))
    volume = np.einsum("ij,ij->", a, np.cross(b, c)) / 6
    assert volume == pytest.approx(4 / 3 * np.pi * 0.6**3, rel=0.01)


def test_solids_without_a_mesh_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.obj"
    with pytest.raises(ValueError, match="the solid is empty"):
        save_obj(torch.full((1, 4, 4, 4), -1.0), path)
    with pytest.raises(ValueError, match="NaN or infinity"):
        save_obj(torch.full((1, 4, 4, 4), torch.nan), path)
    with pytest.raises(ValueError, match=r"voxels \(1, D, H, W\), got \(4, 4, 4\)"):
        save_obj(torch.ones(4, 4, 4), path)
    assert not path.exists()


def test_a_solid_that_fills_the_grid_is_closed_too(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason=NO_SKIMAGE)
    save_obj(torch.ones(1, 4, 4, 4), tmp_path / "cube.obj")
    rows = [line.split() for line in (tmp_path / "cube.obj").read_text().splitlines()]
    vertices = np.array([row[1:] for row in rows if row[0] == "v"], dtype=float)
    # The surface is half a voxel beyond the last centre: at the border of the grid.
    assert_close(torch.tensor([vertices.min(), vertices.max()]), torch.tensor([-1.0, 1.0]).double())
