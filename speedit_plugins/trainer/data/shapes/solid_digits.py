"""Handwritten digits as solids: a dataset of shapes that needs no download.

Axes: x to the right, y up, z towards the viewer. The axes D, H, W of a grid are x, y, z; the index rises with
the coordinate.

Dims: S solids, P the side of a digit's bitmap, R the side of a grid, N points.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.data.shapes.normalization import Moments, Normalization

SPLITS = ("all", "train", "test")
# Side of a digit's bitmap. The source counted the ink of 32 x 32 bitmaps in blocks of 4 x 4.
BITMAP = 32
# Half of a solid's thickness; its height is at most 2.
HALF_DEPTH = 0.25
# A solid's scale is drawn from this range. At 0.9 its corners, at sqrt(1 + HALF_DEPTH^2), are still inside.
SCALES = (0.7, 0.9)
# A voxel's value is the share of its 2 x 2 x 2 places that lie in the solid.
_PLACES = 2
# Points of each solid that the mean and the spread are measured on.
_MEASURED = 64


class SolidDigits:
    """1,797 solids, each a handwritten digit of `Digits`, turned about the vertical axis and scaled.

    A digit is enlarged to 32 x 32, cut at half of the ink, and extruded to a quarter of its height. Angle
    and scale are fixed for each index and seed. The last fifth of the digits, by other writers, is the test
    split.

    Attributes: `classes`, `num_classes`, `channels`, `normalization` (of points; None for voxels).

    Args:
        voxel_size: R, the side of a grid of voxels, >= 8. It has no effect on points.
        num_points: N, points on a solid's surface; 0 gives voxels.
        class_cond: samples have the digit as their label.
        split: "all", "train" or "test".
        seed: decides angle and scale of each solid.
        max_turn_degrees: largest angle to each side, in [0, 180].

    Raises:
        ValueError: an argument is out of range.
    """

    classes: tuple[str, ...] = tuple(map(str, range(10)))

    def __init__(
        self,
        *,
        voxel_size: int = 16,
        num_points: int = 0,
        class_cond: bool = True,
        split: str = "all",
        seed: int = 0,
        max_turn_degrees: float = 45.0,
    ) -> None:
        if voxel_size < 8:
            raise ValueError(f"SolidDigits needs voxel_size >= 8, got {voxel_size}")
        if num_points < 0:
            raise ValueError(f"SolidDigits needs num_points >= 0, got {num_points}")
        if split not in SPLITS:
            raise ValueError(f"SolidDigits needs split in {SPLITS}, got {split!r}")
        if not 0 <= max_turn_degrees <= 180:
            raise ValueError(f"SolidDigits needs max_turn_degrees in [0, 180], got {max_turn_degrees}")
        self.voxel_size, self.num_points = voxel_size, num_points
        self.split, self.seed, self.max_turn_degrees = split, seed, max_turn_degrees
        self.num_classes = 10 if class_cond else 0
        self.channels = 3 if num_points else 1
        digits = Digits(image_size=8)
        self._bitmaps, self._poses = _bitmaps(digits.images), self._drawn_poses(len(digits))
        # Measured on all digits, so that both splits have the same.
        self.normalization = self._measured() if num_points else None
        num_train = len(digits) - len(digits) // 5
        part = {"all": slice(None), "train": slice(num_train), "test": slice(num_train, None)}[split]
        self._bitmaps, self._poses = self._bitmaps[part], self._poses[part]  # (S, P, P), (S, 2)
        self.labels = digits.labels[part]

    def __len__(self) -> int:
        return len(self._bitmaps)

    def identity(self) -> dict[str, str]:
        """A constant for each split, seed and angle: the digits come with their package."""
        drawn = [f"seed {self.seed}", f"turned by up to {self.max_turn_degrees:g} degrees"]
        return identify(contents=["SolidDigits", self.split, *drawn])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "voxels" float32 (1, R, R, R) in [-1, 1], or "points" float32 (3, N); and "label".

        A voxel is -1 outside and 1 inside of the solid, and between at its surface. Points are uniform on the
        surface, and normalised with `normalization`. `generator` draws the points; voxels need none.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"SolidDigits has {len(self)} solids, got index {index}")
        if self.normalization is None:
            sample: dict[str, Any] = {"voxels": self._voxels(index)}
        else:
            sample = {"points": self.normalization.apply(self._points(index, self.num_points, generator))}
        return {**sample, "label": int(self.labels[index])} if self.num_classes else sample

    def _drawn_poses(self, number: int) -> Tensor:
        """Angle in radians and scale of each solid, float32 (S, 2)."""
        generator = torch.Generator().manual_seed(self.seed)
        angle, scale = torch.rand(number, 2, generator=generator).unbind(1)
        widest = math.radians(self.max_turn_degrees)
        return torch.stack([(2 * angle - 1) * widest, SCALES[0] + (SCALES[1] - SCALES[0]) * scale], dim=1)

    def _measured(self) -> Normalization:
        generator = torch.Generator().manual_seed(self.seed)
        solids = range(len(self._bitmaps))
        return Normalization.of(Moments.of(self._points(i, _MEASURED, generator).T) for i in solids)

    def _voxels(self, index: int) -> Tensor:
        angle, scale = self._poses[index].tolist()
        number = _PLACES * self.voxel_size
        place = (torch.arange(number) + 0.5) * (2 / number) - 1  # (Q,), on each axis
        x, z = _turned(place[:, None], place[None, :], -angle)
        x, y, z = x / scale, place / scale, z / scale  # (Q, Q), (Q,), (Q, Q)
        bitmap = functional.pad(self._bitmaps[index], (1, 1, 1, 1))  # a border of empty cells
        columns = ((x + 1) * (BITMAP / 2)).floor().clamp(-1, BITMAP).long() + 1
        rows = ((1 - y) * (BITMAP / 2)).floor().clamp(-1, BITMAP).long() + 1
        inside = bitmap[rows][:, columns] & (z.abs() <= HALF_DEPTH)  # (y, x, z)
        share = functional.avg_pool3d(inside.transpose(0, 1).unsqueeze(0).float(), _PLACES)
        return share * 2 - 1  # (1, R, R, R)

    def _points(self, index: int, number: int, generator: torch.Generator) -> Tensor:
        """Points on the surface, (3, N), each with a probability in proportion to the area."""
        angle, scale = self._poses[index].tolist()
        x, y, z = _on_surface(self._bitmaps[index], number, generator).unbind(0)
        x, z = _turned(x, z, angle)
        return torch.stack([x, y, z]) * scale


def _bitmaps(images: Tensor) -> Tensor:
    """Where a digit is, from grey levels (S, 1, 8, 8) in [-1, 1]: bool (S, P, P)."""
    large = functional.interpolate(images, size=(BITMAP, BITMAP), mode="bicubic", align_corners=False)
    return large[:, 0] > 0


def _turned(x: Tensor, z: Tensor, angle: float) -> tuple[Tensor, Tensor]:
    """x and z after a turn about the y axis, by an angle in radians that takes z towards x."""
    sine, cosine = math.sin(angle), math.cos(angle)
    return x * cosine + z * sine, z * cosine - x * sine


def _on_surface(bitmap: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Points (3, N) on the surface of an extruded bitmap (P, P): two faces per cell, and its open sides."""
    side = 2 / BITMAP
    cells = bitmap.nonzero()  # (cells, 2), row and column
    # Open sides: (row, column) of the side's first corner, and whether it runs along the rows.
    padded = functional.pad(bitmap, (1, 1, 1, 1)).int()
    upright = padded[1:-1].diff(dim=1).nonzero()
    level = padded[:, 1:-1].diff(dim=0).nonzero()
    corner = torch.cat([cells, cells, upright, level]).float()
    sizes = [len(cells), len(cells), len(upright), len(level)]
    kind = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    area = torch.where(kind < 2, side * side, side * 2 * HALF_DEPTH)
    chosen = torch.multinomial(area, number, replacement=True, generator=generator)
    corner, kind = corner[chosen], kind[chosen]
    first, second = torch.rand(2, number, generator=generator)
    row = corner[:, 0] + torch.where(kind == 3, 0.0, first)
    column = corner[:, 1] + torch.where(kind == 2, 0.0, torch.where(kind == 3, first, second))
    depth = torch.where(kind < 2, 1.0 - 2 * kind, 2 * second - 1) * HALF_DEPTH
    return torch.stack([column * side - 1, 1 - row * side, depth])


DATASETS.register_module(name="SolidDigits", module=SolidDigits)
