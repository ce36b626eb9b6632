"""Shapes from files: points or voxels of an `.npy`, or from a mesh.

Dims: M points in a file, N of a sample, R the side of a grid.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.trainer.data.shapes import meshes

SUFFIXES = (".npy", *meshes.SUFFIXES)


def read_points(
    path: Path, number: int, generator: torch.Generator, *, fit_box: bool, is_whole: bool = False
) -> Tensor:
    """N points of a file, float32 (N, 3).

    Args:
        path: an `.npy` of points (M, 3), or what `meshes.surface_points` reads.
        number: N.
        generator: draws them.
        fit_box: move and scale the whole shape into [-1, 1]; False keeps the file's units.
        is_whole: see `meshes.surface_points`.

    Raises:
        ValueError: the file is damaged or no such shape, has too few points, or a value is not finite.
    """
    if path.suffix.lower() != ".npy":
        return meshes.surface_points(path, number, generator, fit_box=fit_box, is_whole=is_whole)
    points = read_cloud(path)
    if fit_box:
        centre, scale = meshes.box_fit(np.stack([points.min(axis=0), points.max(axis=0)]), path)
        points = (points - centre) * scale
    return meshes.some_points(torch.from_numpy(points.astype(np.float32)), number, generator, path)


def read_cloud(path: Path) -> np.ndarray:
    """All points of an `.npy`, (M, 3), finite; raises ValueError as `read_points`."""
    points = _read_array(path)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"{path} holds an array {points.shape}; wanted points (M, 3)")
    if not len(points):
        raise ValueError(f"{path} is empty: it has no points")
    if not np.isfinite(points).all():
        raise ValueError(f"{path} has points that are NaN or infinite")
    return points


def read_voxels(path: Path, size: int, *, is_whole: bool = False) -> Tensor:
    """The voxels of a file, float32 (1, R, R, R) in [-1, 1]: -1 is empty, 1 is full.

    Args:
        path: an `.npy` of bools or of shares in [0, 1], with shape (R, R, R), or a mesh; see `meshes.solid`.
        size: R.
        is_whole: see `meshes.surface_points`.

    Raises:
        ValueError: the file is damaged, of another shape or size, empty, or a value is out of range.
    """
    if path.suffix.lower() != ".npy":
        return meshes.solid(path, size, is_whole=is_whole).float().unsqueeze(0) * 2 - 1
    voxels = _read_array(path)
    if voxels.ndim != 3 or voxels.shape != (size,) * 3:
        raise ValueError(f"{path} holds an array {voxels.shape}; wanted voxels {(size,) * 3}")
    shares = torch.from_numpy(voxels.astype(np.float32))
    if bool(shares.isnan().any()):
        raise ValueError(f"{path} has voxels that are NaN; wanted the full share of each, in [0, 1]")
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"{path} has voxels outside of [0, 1]; wanted the full share of each")
    if not bool(shares.any()):
        raise ValueError(f"{path} is empty: all voxels are 0")
    return shares.unsqueeze(0) * 2 - 1


def _read_array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    # numpy reports a cut file as OSError too.
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"{path} holds no array of numbers; wanted points (M, 3) or voxels (D, H, W)")
    return array
