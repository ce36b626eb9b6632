"""Triangle meshes from files: points on the surface, and solids of voxels.

Dims: N points, R the side of a grid.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.trainer.data.shapes.text_meshes import check_whole

# What trimesh reads here. Its other formats have scenes, units and textures.
SUFFIXES = (".ply", ".off", ".obj")


def surface_points(
    path: Path, number: int, generator: torch.Generator, *, fit_box: bool, is_whole: bool = False
) -> Tensor:
    """Points float32 (N, 3): evenly on a mesh's surface, or some of a cloud's own points, without repeats.

    Args:
        path: a mesh, or a cloud: a `.ply` without faces.
        number: N.
        generator: draws the points.
        fit_box: see `box_fit`; False keeps the file's units.
        is_whole: the file has passed `check_whole` before, so it is read once, not twice.

    Raises:
        ValueError: the file is damaged, is empty, has too few points, or a value is not finite; names it.
        ImportError: trimesh is missing.
    """
    shape = _read(path, is_whole=is_whole)
    if fit_box:
        centre, scale = box_fit(shape.bounds, path)
        shape.apply_translation(-centre)
        shape.apply_scale(scale)
    if not _has_faces(shape):
        points = torch.from_numpy(np.array(shape.vertices, dtype=np.float32))
        return some_points(points, number, generator, path)
    from trimesh.sample import sample_surface

    # In proportion to the areas of the faces, then uniform within each.
    seed = int(torch.randint(2**31, (), generator=generator))
    points, _ = sample_surface(shape, number, seed=seed)
    return torch.from_numpy(np.array(points, dtype=np.float32))


def solid(path: Path, size: int, *, is_whole: bool = False) -> Tensor:
    """A mesh as a solid: bool (R, R, R), its longest side as long as the grid, centred on the other axes.

    Voxels that the surface touches belong to it, and so do hollows that it closes.
    `is_whole` as in `surface_points`.

    Raises:
        ValueError: the file is damaged or empty, has no faces, or a value is not finite; names it.
        ImportError: trimesh or scipy is missing.
    """
    mesh = _read(path, is_whole=is_whole)
    if not _has_faces(mesh):
        raise ValueError(f"{path} has no faces; wanted a mesh, to fill it with voxels")
    from scipy.ndimage import binary_fill_holes
    from trimesh.voxel.creation import voxelize

    centre, scale = box_fit(mesh.bounds, path)
    mesh.apply_translation(-centre)
    # A voxel with index i reaches from i - 1/2 to i + 1/2. A point on the outer border would round out of it.
    mesh.apply_scale(scale * size / 2 * (1 - 1e-6))
    mesh.apply_translation([(size - 1) / 2] * 3)
    voxels: Any = voxelize(mesh, pitch=1.0)
    touched = np.rint(voxels.points).astype(int)  # (K, 3)
    grid = np.zeros((size,) * 3, dtype=bool)
    grid[tuple(touched.clip(0, size - 1).T)] = True
    return torch.from_numpy(binary_fill_holes(grid))


def box_fit(bounds: np.ndarray, path: Path) -> tuple[np.ndarray, float]:
    """Centre (3) of a box, and the factor that makes its longest side 2, so that it fits into [-1, 1].

    Args:
        bounds: the box's lowest and highest corner, (2, 3).
        path: the file that it belongs to.

    Raises:
        ValueError: the box is a point; names the file.
    """
    low, high = bounds
    longest = float((high - low).max())
    if not longest > 0:
        raise ValueError(f"{path} has all points at one place; wanted a shape")
    return (low + high) / 2, 2 / longest


def some_points(points: Tensor, number: int, generator: torch.Generator, path: Path) -> Tensor:
    """N of the points (M, 3), drawn without repeats; all in order if M is N.

    Raises:
        ValueError: there are fewer; names the file.
    """
    if len(points) < number:
        raise ValueError(f"{path} has {len(points)} points; wanted at least num_points: {number}")
    if len(points) == number:
        return points
    return points[torch.randperm(len(points), generator=generator)[:number]]


def _has_faces(shape: Any) -> bool:
    return len(getattr(shape, "faces", ())) > 0


def _read(path: Path, *, is_whole: bool) -> Any:
    """trimesh's mesh or cloud of a file, with finite vertices and, with faces, a surface."""
    shape = _parsed(path, is_whole=is_whole)
    vertices = np.asarray(getattr(shape, "vertices", ()))
    if not len(vertices):
        raise ValueError(f"{path} is empty: it has no points")
    if not np.isfinite(vertices).all():
        raise ValueError(f"{path} has points that are NaN or infinite")
    if _has_faces(shape) and not shape.area > 0:
        raise ValueError(f"{path} is empty: its {len(shape.faces)} faces have no area")
    return shape


def _parsed(path: Path, *, is_whole: bool) -> Any:
    """What trimesh makes of a file."""
    # Imported here because it is optional.
    try:
        import trimesh
    except ImportError as error:
        message = f"{path.suffix} files need trimesh: pip install 'speedit-plugins[shapes]'"
        raise ImportError(message) from error
    try:
        # Several groups of an .obj become one mesh. `process` would merge vertices.
        shape: Any = trimesh.load(path, process=False)
        if isinstance(shape, trimesh.Scene):
            shape = shape.to_mesh()
        if not is_whole:
            check_whole(path)
    except OSError:
        raise
    # A damaged file can fail in any parser.
    except Exception as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return shape
