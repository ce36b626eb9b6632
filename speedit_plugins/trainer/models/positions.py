"""Fixed sine-cosine positions of patches and of frames.

Dims: `D` width of the model, `F` frames.
"""

import torch
from torch import Tensor

from speedit_plugins.trainer.models.conditioning import MAX_PERIOD


def sincos_positions(hidden_size: int, grid_size: int, *, shape: tuple[int, int] | None = None) -> Tensor:
    """Fixed position table of a grid in row-major order, float32 (1, rows * columns, D), on the CPU.

    The first half of D encodes the column, the second the row, each as sines then cosines at D/4 frequencies
    10000^(-i / (D/4)). Source: Vaswani et al. 2017, arXiv:1706.03762, per axis as in MAE, arXiv:2111.06377.

    Args:
        hidden_size: D; a multiple of 4.
        grid_size: places lie in [0, grid_size) on both axes, equally far apart, from 0 on.
        shape: rows and columns of the grid; None is the square of grid_size, with the places 0, 1, ...

    Raises:
        ValueError: hidden_size is no multiple of 4.
    """
    if hidden_size % 4:
        raise ValueError(f"sincos_positions needs a hidden_size that is a multiple of 4, got {hidden_size}")
    quarter = hidden_size // 4
    rows, columns = shape or (grid_size, grid_size)

    def encoded(count: int) -> Tensor:
        # On the CPU whatever the default device is, and in float64: large angles lose digits in float32.
        place = torch.arange(count, dtype=torch.float64, device="cpu") * (grid_size / count)
        rank = torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter
        angle = torch.outer(place, MAX_PERIOD**-rank)
        return torch.cat((angle.sin(), angle.cos()), dim=1)  # (count, D / 2)

    column = encoded(columns).unsqueeze(0).expand(rows, -1, -1)
    row = encoded(rows).unsqueeze(1).expand(-1, columns, -1)
    return torch.cat((column, row), dim=2).reshape(1, rows * columns, hidden_size).float()


def sincos_frames(hidden_size: int, num_frames: int) -> Tensor:
    """Fixed position table of the frames 0, 1, ... of a clip, float32 (1, F, D), on the CPU.

    Sines, then cosines, at D/2 frequencies 10000^(-i / (D/2)): the columns' half of a table twice as wide.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """
    return sincos_positions(2 * hidden_size, num_frames, shape=(1, num_frames))[..., :hidden_size]
