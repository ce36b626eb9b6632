"""Points on the surface of solids of voxels, so that solids are measured as clouds are.

Dims: S solids, N points.
"""

import torch
from torch import Tensor
from torch.nn import functional


def surface_of_voxels(voxels: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Points (S, 3, N) in [-1, 1], uniform on the faces between full and empty voxels.

    A voxel is full above 0. The grid's outside is empty.

    Args:
        voxels: (S, 1, D, H, W) in [-1, 1], with axes x, y and z.
        number: N, >= 1.
        generator: draws the points, on the CPU.

    Raises:
        ValueError: the shape is wrong, a value is not finite, or a solid has no full voxel; names its number.
    """
    if voxels.ndim != 5 or voxels.shape[1] != 1 or number < 1:
        raise ValueError(
            f"wanted solids (S, 1, D, H, W) and at least 1 point, got {tuple(voxels.shape)} and {number}"
        )
    solids = voxels[:, 0].detach().cpu()
    for index, solid in enumerate(solids):
        if not bool(solid.isfinite().all()):
            raise ValueError(f"solid {index} has voxels that are NaN or infinite")
        if not bool((solid > 0).any()):
            raise ValueError(f"solid {index} is empty: no voxel is above 0")
    return torch.stack([_points(solid > 0, number, generator) for solid in solids])


def _points(full: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Points (3, N) on the faces of a solid, bool (D, H, W)."""
    padded = functional.pad(full, (1,) * 6).int()
    corners, normals = [], []
    for axis in range(3):
        # A face lies before the voxel with its index along the axis; the pad does not count along the others.
        inner = [slice(None) if other == axis else slice(1, -1) for other in range(3)]
        faces = padded[tuple(inner)].diff(dim=axis).nonzero()  # (K, 3)
        corners.append(faces)
        normals.append(torch.full((len(faces),), axis))
    corner, normal = torch.cat(corners), torch.cat(normals)
    # The sides of a voxel, and so the areas of its faces, differ if the grid is not a cube.
    side = 2 / torch.tensor(full.shape, dtype=torch.float32)
    area = (side.prod() / side)[normal]
    chosen = torch.multinomial(area, number, replacement=True, generator=generator)
    within = torch.rand(number, 3, generator=generator)
    within[torch.arange(number), normal[chosen]] = 0.0
    return ((corner[chosen] + within) * side - 1).T
