"""Random masks for inpainting training: holes in space.

Dims: H x W pixels; D x H x W voxels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from speedit_plugins.registry import MASKS


class RandomMasks:
    """Masks that are a rectangle or a chain of brush strokes, at random.

    A video has the same hole in all of its frames. In a solid the rectangle is a box, and the strokes are
    tubes through space.

    Source of the two shapes: Suvorov et al. 2021 (LaMa), arXiv:2109.07161, appendix.

    Args:
        box_prob: probability of a rectangle, in [0, 1].
        box_share: smallest and largest sides of a rectangle, as fractions of the image's or the solid's,
            in (0, 1].
        num_strokes: largest number of strokes in a chain, >= 1.
        brush_share: smallest and largest brush width, as fractions of the shortest side, in (0, 1].

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        *,
        box_prob: float = 0.5,
        box_share: tuple[float, float] = (0.25, 0.75),
        num_strokes: int = 6,
        brush_share: tuple[float, float] = (0.1, 0.25),
    ) -> None:
        if not 0 <= box_prob <= 1:
            raise ValueError(f"RandomMasks needs box_prob in [0, 1], got {box_prob}")
        for name, share in (("box_share", box_share), ("brush_share", brush_share)):
            if not isinstance(share, Sequence) or len(share) != 2 or not 0 < share[0] <= share[1] <= 1:
                raise ValueError(
                    f"RandomMasks needs {name} = (low, high) with 0 < low <= high <= 1, got {share!r}"
                )
        if num_strokes < 1:
            raise ValueError(f"RandomMasks needs num_strokes >= 1, got {num_strokes}")
        self.box_prob, self.num_strokes = box_prob, num_strokes
        self.box_share, self.brush_share = tuple(box_share), tuple(brush_share)

    def draw(self, height: int, width: int, generator: torch.Generator) -> Tensor:
        """A mask, float32 (H, W), on the generator's device: 1 in the hole, 0 elsewhere; never all 0."""
        return self._mask((height, width), generator)

    def draw_solid(self, sides: Sequence[int], generator: torch.Generator) -> Tensor:
        """As `draw`, for a solid with these sides: (D, H, W)."""
        return self._mask(sides, generator)

    def _mask(self, sides: Sequence[int], generator: torch.Generator) -> Tensor:
        axes = len(sides)
        count = 1 + 2 * axes + axes * (self.num_strokes + 1)
        chances = torch.rand(count, generator=generator, device=generator.device).tolist()
        if chances[0] < self.box_prob:
            return self._box(sides, chances[1:], generator.device)
        return self._strokes(sides, chances[1:], generator.device)

    def _box(self, sides: Sequence[int], chances: list[float], device: torch.device) -> Tensor:
        low, high = self.box_share
        axes = len(sides)
        mask = torch.zeros(*sides, device=device)
        taken = [
            max(1, round(side * (low + (high - low) * chance)))
            for side, chance in zip(sides, chances[:axes], strict=True)
        ]
        starts = [
            math.floor(chance * (side - length + 1))
            for side, length, chance in zip(sides, taken, chances[axes : 2 * axes], strict=True)
        ]
        mask[tuple(slice(start, start + length) for start, length in zip(starts, taken, strict=True))] = 1
        return mask

    def _strokes(self, sides: Sequence[int], chances: list[float], device: torch.device) -> Tensor:
        low, high = self.brush_share
        axes = len(sides)
        # A point is at most sqrt(axes) / 2 from the nearest pixel; a larger radius always covers one.
        radius = max(0.75 if axes == 2 else 0.9, min(sides) * (low + (high - low) * chances[0]) / 2)
        count = 1 + math.floor(chances[1] * self.num_strokes)
        first = 2 * axes
        points = torch.tensor(chances[first : first + axes * (count + 1)], device=device)
        points = points.view(count + 1, axes) * torch.tensor([side - 1 for side in sides], device=device)
        places = [torch.arange(side, device=device, dtype=torch.float32) for side in sides]
        pixels = torch.stack(torch.meshgrid(*places, indexing="ij"), dim=-1)  # (..., axes)
        hole = torch.zeros(*sides, dtype=torch.bool, device=device)
        for start, end in zip(points[:-1], points[1:], strict=True):
            along = end - start
            # Nearest point on the segment for each pixel, as a fraction of its length.
            place = ((pixels - start) @ along / along.dot(along).clamp(min=1e-6)).clamp(0, 1)
            distance = (pixels - start - place.unsqueeze(-1) * along).norm(dim=-1)
            hole |= distance <= radius
        return hole.float()


MASKS.register_module(name="RandomMasks", module=RandomMasks)
