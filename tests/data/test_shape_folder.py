import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.shapes import meshes
from speedit_plugins.trainer.data.shapes.folder import ShapeFolder
from speedit_plugins.trainer.data.shapes.normalization import Moments, Normalization

# A box 4 x 2 x 1 with one corner at (10, 0, 0), as four-sided faces.
BOX = [[10 + 4 * x, 2 * y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)]
SIDES = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
NO_TRIMESH = "the optional package trimesh reads meshes"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def write_off(path: Path, vertices: list[list[float]], faces: list[list[int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["OFF", f"{len(vertices)} {len(faces)} 0"]
    lines += [" ".join(map(str, vertex)) for vertex in vertices]
    lines += [" ".join(map(str, (len(face), *face))) for face in faces]
    path.write_text("\n".join(lines) + "\n")


def write_obj(path: Path, vertices: list[list[float]], faces: list[list[int]]) -> None:
    lines = [" ".join(map(str, ("v", *vertex))) for vertex in vertices]
    lines += [" ".join(map(str, ("f", *(number + 1 for number in face)))) for face in faces]
    path.write_text("\n".join(lines) + "\n")


def write_ply(path: Path, vertices: list[list[float]], faces: list[list[int]]) -> None:
    head = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    if faces:
        head += [f"element face {len(faces)}", "property list uchar int vertex_indices"]
    lines = [" ".join(map(str, vertex)) for vertex in vertices]
    lines += [" ".join(map(str, (len(face), *face))) for face in faces]
    path.write_text("\n".join([*head, "end_header", *lines]) + "\n")


def save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def in_units(dataset: ShapeFolder, index: int = 0) -> Tensor:
    """Points (N, 3) before the normalization."""
    assert dataset.normalization is not None
    return dataset.normalization.invert(dataset.load(index, generator())["points"]).T


def test_points_of_npy_files_are_drawn_without_repeats_and_normalised(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clouds = {f"{name}/{i}": rng.normal(5, 2, (50, 3)) for name in ("lamp", "chair") for i in range(3)}
    for name, points in clouds.items():
        save(tmp_path / f"{name}.npy", points.astype(np.float32))
    (tmp_path / "chair" / "notes.txt").touch()
    dataset = ShapeFolder(tmp_path, num_points=50, fit_box=False)
    assert (dataset.classes, dataset.num_classes, dataset.channels) == (("chair", "lamp"), 2, 3)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.left_out == {".txt": 1}
    assert dataset.name(3) == "lamp/0.npy"
    # With every point of every file, the normalization is that of the whole set.
    everything = np.concatenate(list(clouds.values()))
    assert dataset.normalization is not None
    assert_close(dataset.normalization.mean, tuple(everything.mean(axis=0).tolist()), atol=1e-5, rtol=0)
    assert_close(dataset.normalization.std, float(everything.std()), atol=1e-5, rtol=0)
    assert_close(in_units(dataset, 4).double(), torch.from_numpy(clouds["lamp/1"]), atol=1e-5, rtol=0)
    assert dataset.load(4, generator())["label"] == 1
    some = in_units(ShapeFolder(tmp_path, num_points=20, fit_box=False), 4).double()
    distances = torch.cdist(some, torch.from_numpy(clouds["lamp/1"]))
    assert distances.min(dim=1).values.max() < 1e-5
    assert len(distances.argmin(dim=1).unique()) == 20
    batch = next(ResumableLoader(dataset, batch_size=4, seed=0))
    assert batch["points"].shape == (4, 3, 50)


def test_each_shape_is_fitted_into_the_box(tmp_path: Path) -> None:
    # Sides 4, 2 and 1 around (12, 1, 0.5).
    save(tmp_path / "box.npy", np.array(BOX, dtype=np.float64))
    points = in_units(ShapeFolder(tmp_path, num_points=8, class_cond=False))
    expected = (torch.tensor(BOX, dtype=torch.float32) - torch.tensor([12, 1, 0.5])) / 2
    assert_close(points, expected, atol=1e-6, rtol=0)


def test_a_part_held_out_takes_the_normalization_of_the_training(tmp_path: Path) -> None:
    save(tmp_path / "box.npy", np.array(BOX, dtype=np.float64))
    dataset = build(
        DATASETS,
        {"type": "ShapeFolder", "root": str(tmp_path), "num_points": 8, "class_cond": False}
        | {"fit_box": False, "mean": [10, 0, 0], "std": 2.0},
    )
    assert_close(
        dataset.load(0, generator())["points"].T * 2, torch.tensor(BOX).float() - torch.tensor([10, 0, 0])
    )


def test_voxels_are_shares_that_become_minus_one_to_one(tmp_path: Path) -> None:
    shares = np.zeros((4, 4, 4), dtype=np.float32)
    shares[1, 2, 3] = 0.25
    save(tmp_path / "a" / "soft.npy", shares)
    save(tmp_path / "b" / "hard.npy", shares > 0)
    dataset = ShapeFolder(tmp_path, voxel_size=4)
    assert (dataset.channels, dataset.normalization) == (1, None)
    soft, hard = (dataset.load(index, generator())["voxels"] for index in range(2))
    assert soft.shape == (1, 4, 4, 4)
    assert (float(soft[0, 1, 2, 3]), float(hard[0, 1, 2, 3])) == (-0.5, 1.0)
    assert soft.sum() == -63.5


@pytest.mark.parametrize("write", [write_off, write_obj, write_ply])
def test_points_are_even_over_the_surface_of_a_mesh(tmp_path: Path, write: object) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    write(tmp_path / f"box.{write.__name__[-3:]}", BOX, SIDES)  # type: ignore[operator]  # one of the writers
    number = 20_000
    points = in_units(ShapeFolder(tmp_path, num_points=number, class_cond=False, fit_box=False))
    low, high = torch.tensor([10.0, 0, 0]), torch.tensor([14.0, 2, 1])
    # Faces perpendicular to x have 2 x 1 of 2 (2 + 4 + 8), those to y 4 x 1, those to z 4 x 2.
    for axis, area in enumerate((2, 4, 8)):
        for end in (low, high):
            share = ((points[:, axis] - end[axis]).abs() < 1e-4).double().mean()
            # 4 sigma of a binomial frequency, and the edges' points, which belong to two faces.
            assert_close(float(share), area / 28, atol=4 * math.sqrt(0.25 / number) + 1e-3, rtol=0)
    assert (points > low - 1e-4).all()
    assert (points < high + 1e-4).all()
    assert_close(points.mean(dim=0), torch.tensor([12, 1, 0.5]), atol=0.05, rtol=0)


def test_all_parts_of_an_obj_are_one_shape(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    # Two unit squares, 9 apart, with materials that nobody wrote.
    lines = ["mtllib missing.mtl"]
    for number, start in enumerate((0, 10)):
        lines += [f"o part{number}", *(f"v {start + x} {y} 0" for x, y in ((0, 0), (1, 0), (1, 1), (0, 1)))]
        lines += [f"usemtl colour{number}", "f " + " ".join(str(4 * number + i) for i in (1, 2, 3, 4))]
    (tmp_path / "parts.obj").write_text("\n".join(lines) + "\n")
    points = in_units(ShapeFolder(tmp_path, num_points=4000, class_cond=False, fit_box=False))
    # 4 sigma of a binomial frequency.
    share = float((points[:, 0] > 5).double().mean())
    assert_close(share, 0.5, atol=4 * math.sqrt(0.25 / 4000), rtol=0)
    assert points[:, 0].max() <= 11


def test_a_header_that_runs_into_the_numbers_is_read_as_in_modelnet(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    (tmp_path / "x.off").write_text("OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    points = in_units(ShapeFolder(tmp_path, num_points=50, class_cond=False, fit_box=False))
    assert (points[:, :2].sum(dim=1) <= 1 + 1e-6).all()


def test_a_ply_without_faces_is_a_cloud(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    write_ply(tmp_path / "box.ply", BOX, [])
    points = in_units(ShapeFolder(tmp_path, num_points=8, class_cond=False, fit_box=False))
    assert_close(points, torch.tensor(BOX, dtype=torch.float32), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"box\.ply has no faces; wanted a mesh"):
        ShapeFolder(tmp_path, voxel_size=8, class_cond=False)


def test_a_mesh_fills_its_voxels(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    write_off(tmp_path / "box.off", BOX, SIDES)
    solid = ShapeFolder(tmp_path, voxel_size=16, class_cond=False).load(0, generator())["voxels"][0] > 0
    # 16 x 8 x 4 voxels in the middle. A face exactly between two voxels may touch both.
    assert solid[:, 4:12, 6:10].all()
    assert not solid[:, :3].any()
    assert not solid[:, 13:].any()
    assert not solid[:, :, :5].any()
    assert not solid[:, :, 11:].any()


def test_damaged_files_are_named_before_training(tmp_path: Path) -> None:
    def message(array: np.ndarray, **options: int) -> str:
        save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=r"x\.npy") as caught:
            ShapeFolder(tmp_path, class_cond=False, **(options or {"num_points": 4}))
        return str(caught.value)

    broken = np.ones((8, 3))
    broken[3, 1] = np.nan
    assert "NaN or infinite" in message(broken)
    assert "array (8, 2); wanted points (M, 3)" in message(np.ones((8, 2)))
    assert "has 3 points; wanted at least num_points: 4" in message(np.arange(9.0).reshape(3, 3))
    assert "empty: it has no points" in message(np.ones((0, 3)))
    assert "all points at one place" in message(np.ones((8, 3)))
    assert "no array of numbers" in message(np.array(["a"]))
    assert "array (8, 3); wanted voxels (4, 4, 4)" in message(np.ones((8, 3)), voxel_size=4)
    assert "(4, 4, 5); wanted voxels (4, 4, 4)" in message(np.ones((4, 4, 5)), voxel_size=4)
    assert "voxels that are NaN" in message(np.full((4, 4, 4), np.nan), voxel_size=4)
    assert "outside of [0, 1]" in message(np.full((4, 4, 4), 1.5), voxel_size=4)
    assert "all voxels are 0" in message(np.zeros((4, 4, 4)), voxel_size=4)
    # In float32 the points of this one fall together, and the spread of the next is lost in float64.
    far = np.random.default_rng(0).normal(size=(8, 3))
    for place in (1e12, 1e8):
        found = message(far + place, num_points=8, fit_box=False)
        assert (
            f"{tmp_path} with x.npy: the 8 points of the data set are all at one place, or too far" in found
        )
        assert "wanted fit_box true" in found
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"x\.npy is damaged"):
        ShapeFolder(tmp_path, class_cond=False, voxel_size=4)


@pytest.mark.parametrize(
    ("vertices", "faces", "message"),
    [
        ([], [], "is empty|is damaged"),
        ([[0, 0, 0]] * 3, [[0, 1, 2]], "no area|one place"),
        ([[0, 0, 0], [1, 0, 0], [0, "nan", 0]], [[0, 1, 2]], "NaN or infinite|is damaged"),
        ([[0, 0, 0]], [[0, 1, 2]], "is damaged"),
    ],
)
def test_damaged_meshes_are_named(tmp_path: Path, vertices: list, faces: list, message: str) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    write_off(tmp_path / "x.off", vertices, faces)
    for options in ({"num_points": 4}, {"voxel_size": 8}):
        with pytest.raises(ValueError, match=rf"x\.off.*({message})"):
            ShapeFolder(tmp_path, class_cond=False, **options)


@pytest.mark.parametrize("write", [write_off, write_ply])
def test_a_text_file_that_was_cut_is_named_wherever_it_ends(tmp_path: Path, write: object) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    path = tmp_path / f"box.{write.__name__[-3:]}"  # type: ignore[attr-defined]  # one of the writers

    def message() -> str:
        with pytest.raises(ValueError, match=rf"{path.name} is damaged") as caught:
            ShapeFolder(tmp_path, num_points=4, class_cond=False)
        return str(caught.value)

    write(path, BOX, SIDES)  # type: ignore[operator]  # as above
    whole = path.read_text().splitlines(keepends=True)
    # A blank line, and what a parser ignores, are no fault.
    path.write_text("".join([*whole, "\n"]))
    assert len(ShapeFolder(tmp_path, num_points=4, class_cond=False)) == 1
    # Two sides of four are as many triangles as there are faces with three corners.
    for missing in (4, 3, 1):
        path.write_text("".join(whole[:-missing]))
        assert f"ends after {6 - missing} of 6 faces" in message()
    # In the middle of the last row, "4 1 5 7 3".
    path.write_text("".join(whole)[:-4])
    assert "ends after 5 of 6 faces" in message()
    path.write_text("".join(whole[:-8]))
    message()


@pytest.mark.parametrize("write", [write_off, write_ply])
@pytest.mark.parametrize("options", [{"num_points": 4}, {"voxel_size": 8}])
def test_whether_a_text_file_is_whole_is_asked_once_not_at_each_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object, options: dict[str, int]
) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    asked: list[Path] = []
    monkeypatch.setattr(meshes, "check_whole", asked.append)
    path = tmp_path / f"box.{write.__name__[-3:]}"  # type: ignore[attr-defined]  # one of the writers
    write(path, BOX, SIDES)  # type: ignore[operator]  # as above
    dataset = ShapeFolder(tmp_path, class_cond=False, **options)  # type: ignore[arg-type]  # keys are names of ints
    assert asked == [path]
    for _ in range(3):
        dataset.load(0, generator())
    assert asked == [path]


def test_a_cloud_in_text_that_was_cut_is_named(tmp_path: Path) -> None:
    pytest.importorskip("trimesh", reason=NO_TRIMESH)
    write_ply(tmp_path / "box.ply", BOX, [])
    text = (tmp_path / "box.ply").read_text()
    (tmp_path / "box.ply").write_text("\n".join(text.splitlines()[:-4]) + "\n")
    with pytest.raises(ValueError, match=r"box\.ply is damaged.* ends after 4 of 8 vertices"):
        ShapeFolder(tmp_path, num_points=2, class_cond=False)


def test_the_layout_and_the_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs num_points >= 1 for points, or voxel_size >= 1"):
        ShapeFolder(tmp_path)
    with pytest.raises(ValueError, match="no effect on voxels"):
        ShapeFolder(tmp_path, voxel_size=4, fit_box=False)
    with pytest.raises(ValueError, match="both mean and std"):
        ShapeFolder(tmp_path, num_points=4, std=1.0)
    with pytest.raises(ValueError, match="found no shapes below"):
        ShapeFolder(tmp_path, num_points=4, class_cond=False)
    save(tmp_path / "x.npy", np.arange(12.0).reshape(4, 3))
    with pytest.raises(ValueError, match="one folder per class"):
        ShapeFolder(tmp_path, num_points=4)
    with pytest.raises(ValueError, match="std > 0, got .* 0"):
        Normalization((0, 0, 0), 0)


def test_moments_survive_the_index_and_parts_add_up() -> None:
    points = torch.randn(60, 3, generator=generator(), dtype=torch.float64) * 3 + 100
    parts = [Moments.parse(str(Moments.of(part))) for part in points.split(7)]
    whole = Normalization.of(parts)
    assert_close(whole.mean, tuple(points.mean(dim=0).tolist()))
    assert_close(whole.std, float(points.std(correction=0)))
    assert_close(whole.invert(whole.apply(points.T)), points.T)
