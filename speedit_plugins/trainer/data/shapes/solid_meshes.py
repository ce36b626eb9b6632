"""Meshes from solids of voxels, by marching cubes.

Dims: R the side of a grid, V vertices, K triangles.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor


@dataclass(frozen=True)
class Mesh:
    """A closed surface of triangles.

    Args:
        vertices: float64 (V, 3), x, y and z in [-1, 1].
        triangles: int64 (K, 3), numbers of vertices, counter-clockwise from outside.
    """

    vertices: npt.NDArray[np.float64]
    triangles: npt.NDArray[np.int64]


def mesh_of_voxels(voxels: Tensor) -> Mesh:
    """The surface where the voxels, interpolated between their centres, are 0.

    The grid's outside is empty, so the mesh is closed.

    Source: Lewiner et al. 2003, "Efficient implementation of marching cubes' cases with topological
    guarantees", as in scikit-image.

    Args:
        voxels: (D, H, W) in [-1, 1], with axes x, y and z.

    Raises:
        ValueError: the shape is wrong, a value is not finite, or no voxel is above 0.
        ImportError: scikit-image is missing.
    """
    if voxels.ndim != 3:
        raise ValueError(f"a mesh needs voxels (D, H, W), got {tuple(voxels.shape)}")
    if not bool(voxels.isfinite().all()):
        raise ValueError("a mesh needs finite voxels, got NaN or infinity")
    if not bool((voxels > 0).any()):
        raise ValueError("no mesh: the solid is empty, no voxel is above 0")
    # Imported here because it is optional.
    try:
        from skimage.measure import marching_cubes
    except ImportError as error:
        message = "meshes of voxels need scikit-image: pip install 'speedit-plugins[shapes]'"
        raise ImportError(message) from error
    padded = np.pad(voxels.detach().cpu().double().numpy(), 1, constant_values=-1.0)
    # scikit-image orders corners clockwise from outside where values fall outward. Its other order is ours.
    vertices, triangles, _, _ = marching_cubes(padded, level=0.0, gradient_direction="ascent")
    # A vertex at the centre of the first voxel has place 1 in the padded grid.
    places = (2 * vertices.astype(np.float64) - 1) / np.array(voxels.shape) - 1
    return Mesh(places, triangles.astype(np.int64))
