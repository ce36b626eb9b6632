"""From a cloud of points to a cube of voxels and back, and from voxels to tokens.

Source: the point-voxel layers of Liu et al. 2019, arXiv:1907.03739, as DiT-3D, Mo et al. 2023,
arXiv:2307.01831, applies them. Vectorised over samples and points, in torch.

Dims: `B` batch, `C` channels, `N` points, `V` voxels on a side, `P` side of a patch, `T` tokens, `D` width.
"""

from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.blocks import PatchEmbedder


def voxel_places(points: Tensor, edge: int) -> Tensor:
    """Where the points of each cloud lie in a cube of voxels, in units of voxels, without a gradient.

    The cloud's mean lies at edge / 2. Its farthest point has the distance edge / 2 from there.

    Args:
        points: (B, 3, N).
        edge: V.

    Returns:
        Places in [0, V - 1], float32 or wider, (B, 3, N). A voxel's centre has whole numbers.
    """
    points = _at_least_float32(points.detach())
    centred = points - points.mean(dim=2, keepdim=True)
    radius = centred.norm(dim=1, keepdim=True).amax(dim=2, keepdim=True)  # (B, 1, 1)
    # A cloud of equal points has no radius. It lies in the middle.
    radius = radius.clamp(min=torch.finfo(radius.dtype).tiny)
    return ((centred / (2 * radius) + 0.5) * edge).clamp(0, edge - 1)


def voxelised(features: Tensor, places: Tensor, edge: int) -> Tensor:
    """The mean of the features in each voxel; 0 where there is no point.

    Args:
        features: (B, C, N).
        places: of `voxel_places`, (B, 3, N). A point belongs to the nearest voxel.
        edge: V.

    Returns:
        (B, C, V, V, V), in the dtype of the features. A gradient reaches the features.
    """
    index = _flat(places.round().long(), edge).unsqueeze(1)  # (B, 1, N)
    values = _at_least_float32(features)
    counts = values.new_zeros(len(values), 1, edge**3).scatter_add(2, index, torch.ones_like(values[:, :1]))
    shares = values / counts.gather(2, index)
    sums = values.new_zeros(*values.shape[:2], edge**3)
    cubes = sums.scatter_add(2, index.expand_as(shares), shares)  # (B, C, V^3)
    return cubes.view(*values.shape[:2], edge, edge, edge).to(features.dtype)


def devoxelised(cubes: Tensor, places: Tensor) -> Tensor:
    """The values of the cubes at the places, trilinear between the centres of voxels.

    Args:
        cubes: (B, C, V, V, V).
        places: in [0, V - 1], (B, 3, N).

    Returns:
        (B, C, N), in the dtype of the cubes. A gradient reaches the cubes.
    """
    edge = cubes.shape[2]
    low = places.floor()
    fraction = places - low  # (B, 3, N)
    low = low.long()
    high = (low + 1).clamp(max=edge - 1)
    weights, indices = [], []
    for corner in product((0, 1), repeat=3):
        # For each axis 0 is the lower neighbour, 1 the upper one.
        chosen = list(enumerate(corner))
        shares = [fraction[:, axis] if bit else 1 - fraction[:, axis] for axis, bit in chosen]
        weights.append(shares[0] * shares[1] * shares[2])  # (B, N)
        neighbour = [high[:, axis] if bit else low[:, axis] for axis, bit in chosen]
        indices.append(_flat(torch.stack(neighbour, dim=1), edge))
    flat = _at_least_float32(cubes).flatten(2)  # (B, C, V^3)
    index = torch.stack(indices, dim=1).flatten(1).unsqueeze(1).expand(-1, flat.shape[1], -1)  # (B, C, 8 N)
    values = flat.gather(2, index).unflatten(2, (8, -1))  # (B, C, 8, N)
    return (values * torch.stack(weights, dim=1).unsqueeze(1)).sum(dim=2).to(cubes.dtype)


class CubeEmbedder(PatchEmbedder):
    """Maps each P x P x P patch linearly to a token, in row-major order: (B, C, V, V, V) -> (B, T, D).

    The weight has the form of the equivalent convolution's, `proj.weight` (D, C, P, P, P).
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        nn.Module.__init__(self)
        self.proj = nn.Conv3d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)  # type: ignore[assignment]  # the parent's has two axes

    def forward(self, x: Tensor) -> Tensor:
        edge = self.proj.kernel_size[0]
        patches = rearrange(x, "b c (x p) (y q) (z r) -> b (x y z) (c p q r)", p=edge, q=edge, r=edge)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def _flat(index: Tensor, edge: int) -> Tensor:
    """Numbers of voxels in row-major order: (B, 3, N) in [0, V) -> (B, N)."""
    x, y, z = index.unbind(1)
    return (x * edge + y) * edge + z


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
