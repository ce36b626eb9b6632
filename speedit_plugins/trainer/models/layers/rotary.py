"""Rotary positions: each attention turns its queries and keys by angles that grow with the position.

The product of a query and a key then depends on the difference of their positions.

Source: Su et al. 2021, arXiv:2104.09864; on two axes as in EVA-02, Fang et al. 2023, arXiv:2303.11331, and
LightningDiT, Yao et al. 2025, arXiv:2501.01423.

Dims: `B` batch, `N` tokens, `H` heads, `K` width of a head, `F` frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.conditioning import MAX_PERIOD


class Rotation(NamedTuple):
    """Cosines and sines of the angles, (N, K) each, or (B, N, K). Entries 2i and 2i + 1 are a pair."""

    cos: Tensor
    sin: Tensor

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys (B, N, H, K) with each pair turned by its angle, in the dtype of x."""
        cos, sin = self.cos.unsqueeze(-2), self.sin.unsqueeze(-2)  # (N, 1, K)
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        crossed = torch.stack((-second, first), dim=-1).flatten(-2)  # (B, N, H, K)
        return torch.addcmul(x * cos, crossed, sin).to(x.dtype)


def line_rotation(head_size: int, places: Tensor) -> Rotation:
    """The rotation of places on one axis, float32.

    The angles are place 10000^(-2i / K), for the pairs i = 0, 1, ...

    Args:
        head_size: K, even.
        places: (N,), on the CPU.
    """
    rank = torch.arange(0, head_size, 2, dtype=torch.float64, device="cpu") / head_size
    # In float64, because large angles lose digits in float32.
    angle = torch.outer(places.double(), MAX_PERIOD**-rank).repeat_interleave(2, dim=1)  # (N, K)
    return Rotation(angle.cos().float(), angle.sin().float())


def grid_rotation(head_size: int, grid_size: int, *, shape: tuple[int, int] | None = None) -> Rotation:
    """The rotation of a grid's places in row-major order, float32 (rows columns, K), on the CPU.

    The first half of K turns with the row and the second half with the column.

    Args:
        head_size: K, a multiple of 4.
        grid_size: on each axis the places start at 0 and are evenly spaced in [0, grid_size).
        shape: rows and columns. None is a square of grid_size rows, with places 0, 1, ...
    """
    rows, columns = shape or (grid_size, grid_size)
    row, column = (
        line_rotation(head_size // 2, torch.arange(count, device="cpu") * (grid_size / count))
        for count in (rows, columns)
    )
    return Rotation(
        *(
            torch.cat((a.repeat_interleave(columns, dim=0), b.repeat(rows, 1)), dim=1)
            for a, b in zip(row, column, strict=True)
        )
    )


class Rotary(nn.Module):
    """A rotation that is stored with the model, in the names of LightningDiT, and not trained.

    Args:
        num_tokens: N.
        head_size: K.
    """

    def __init__(self, num_tokens: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.freqs_cos = nn.Parameter(torch.empty(num_tokens, head_size), requires_grad=False)
        self.freqs_sin = nn.Parameter(torch.empty(num_tokens, head_size), requires_grad=False)

    def table(self) -> Rotation:
        """What is stored; the classes below say it."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Computes the table anew."""
        table = self.table()
        self.freqs_cos.copy_(table.cos)
        self.freqs_sin.copy_(table.sin)


class GridRotary(Rotary):
    """The rotation of patches. It is stored for a square grid, and made for other grids as they come.

    Raises:
        ValueError: head_size is not a multiple of 4.
    """

    def __init__(self, grid_size: int, head_size: int) -> None:
        if head_size % 4:
            raise ValueError(f"rope needs heads with a width that is a multiple of 4, got {head_size}")
        super().__init__(grid_size**2, head_size)
        self.grid_size = grid_size
        # By rows, columns and device. Not buffers: the state dict stays LightningDiT's.
        self._others: dict[tuple[int, int, torch.device], Rotation] = {}

    def table(self) -> Rotation:
        return grid_rotation(self.head_size, self.grid_size)

    def forward(self, rows: int, columns: int) -> Rotation:
        """The rotation of a grid, scaled on each axis to the range of the square one."""
        if rows == columns == self.grid_size:
            return Rotation(self.freqs_cos, self.freqs_sin)
        return Rotation(*(part.to(self.freqs_cos.dtype) for part in self.cached(rows, columns)))

    def cached(self, rows: int, columns: int) -> Rotation:
        """The rotation of a grid other than the model's square, in float32 on the model's device."""
        key = (rows, columns, self.freqs_cos.device)
        if key not in self._others:
            # The backward pass keeps these, and it cannot keep what was made in inference mode.
            with torch.inference_mode(mode=False):
                table = grid_rotation(self.head_size, self.grid_size, shape=(rows, columns))
                self._others[key] = Rotation(*(part.to(self.freqs_cos.device) for part in table))
        return self._others[key]


class FrameRotary(Rotary):
    """The rotation of the frames 0, 1, ... of a clip."""

    def table(self) -> Rotation:
        return line_rotation(self.head_size, torch.arange(len(self.freqs_cos), device="cpu"))

    def forward(self, frames: int) -> Rotation:
        """The rotation of the first frames, (F, K)."""
        return Rotation(self.freqs_cos[:frames], self.freqs_sin[:frames])
