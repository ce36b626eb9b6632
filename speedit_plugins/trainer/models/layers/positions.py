"""Fixed sine-cosine embeddings of the positions of patches, of frames and of cubes.

Dims: `D` width of the model, `F` frames.
"""

import torch
from einops import rearrange
from torch import Tensor

from speedit_plugins.trainer.models.layers.conditioning import MAX_PERIOD


def sincos_positions(hidden_size: int, grid_size: int, *, shape: tuple[int, int] | None = None) -> Tensor:
    """Position table of a grid in row-major order, float32 (1, rows * columns, D), on the CPU.

    The first half of D encodes the column and the second half the row. Each half has sines, then cosines, at
    the D/4 frequencies 10000^(-i / (D/4)). Source: Vaswani et al. 2017, arXiv:1706.03762; one axis after the
    other as in MAE, arXiv:2111.06377.

    Args:
        hidden_size: D, a multiple of 4.
        grid_size: on each axis the positions start at 0 and are evenly spaced in [0, grid_size).
        shape: rows and columns of the grid. None is a square of grid_size rows, with positions 0, 1, ...

    Raises:
        ValueError: hidden_size is not a multiple of 4.
    """
    if hidden_size % 4:
        raise ValueError(f"sincos_positions needs a hidden_size that is a multiple of 4, got {hidden_size}")
    quarter = hidden_size // 4
    rows, columns = shape or (grid_size, grid_size)

    def encoded(count: int) -> Tensor:
        # On the CPU, whatever the default device is. In float64, because large angles lose digits in float32.
        place = torch.arange(count, dtype=torch.float64, device="cpu") * (grid_size / count)
        rank = torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter
        angle = torch.outer(place, MAX_PERIOD**-rank)
        return torch.cat((angle.sin(), angle.cos()), dim=1)  # (count, D / 2)

    column = encoded(columns).unsqueeze(0).expand(rows, -1, -1)
    row = encoded(rows).unsqueeze(1).expand(-1, columns, -1)
    return rearrange(torch.cat((column, row), dim=2), "h w d -> 1 (h w) d").float()


def sincos_frames(hidden_size: int, num_frames: int) -> Tensor:
    """Position table of the frames 0, 1, ... of a clip, float32 (1, F, D), on the CPU.

    It has sines, then cosines, at the D/2 frequencies 10000^(-i / (D/2)). That is the half for the columns of
    a table that is twice as wide. Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    return sincos_positions(2 * hidden_size, num_frames, shape=(1, num_frames))[..., :hidden_size]


def sincos_cube(hidden_size: int, edge: int) -> Tensor:
    """Position table of a cube of edge^3 patches, row-major in (x, y, z), float32 (1, edge^3, D), on the CPU.

    The thirds of D encode x, y and z, each as `sincos_frames` encodes a frame. Source: Mo et al. 2023,
    arXiv:2307.01831.

    Args:
        hidden_size: D, a multiple of 6.
        edge: patches on a side.

    Raises:
        ValueError: hidden_size is not a multiple of 6.
    """
    if hidden_size % 6:
        raise ValueError(f"sincos_cube needs a hidden_size that is a multiple of 6, got {hidden_size}")
    line = sincos_frames(hidden_size // 3, edge)[0]  # (edge, D / 3)
    axes = (line[:, None, None], line[None, :, None], line[None, None, :])
    return torch.cat([axis.expand(edge, edge, edge, -1) for axis in axes], dim=3).view(1, -1, hidden_size)
