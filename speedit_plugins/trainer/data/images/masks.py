"""Random masks for inpainting training.

Dims: H x W pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from speedit_plugins.registry import MASKS


class RandomMasks:
    """Masks that are a rectangle or a chain of brush strokes, at random.

    Source of the two shapes: Suvorov et al. 2021 (LaMa), arXiv:2109.07161, appendix.

    Args:
        box_prob: probability of a rectangle, in [0, 1].
        box_share: smallest and largest height and width of a rectangle, as fractions of the image's, in
            (0, 1].
        num_strokes: largest number of strokes in a chain, >= 1.
        brush_share: smallest and largest brush width, as fractions of the shorter image side, in (0, 1].

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
        uniform = torch.rand(5 + 2 * self.num_strokes + 2, generator=generator, device=generator.device)
        chances = uniform.tolist()
        if chances[0] < self.box_prob:
            return self._box(height, width, chances, generator.device)
        return self._strokes(height, width, chances, generator.device)

    def _box(self, height: int, width: int, chances: list[float], device: torch.device) -> Tensor:
        low, high = self.box_share
        mask = torch.zeros(height, width, device=device)
        rows, columns = (
            max(1, round(side * (low + (high - low) * chance)))
            for side, chance in zip((height, width), chances[1:3], strict=True)
        )
        top, left = (
            math.floor(chance * (side - taken + 1))
            for side, taken, chance in zip((height, width), (rows, columns), chances[3:5], strict=True)
        )
        mask[top : top + rows, left : left + columns] = 1
        return mask

    def _strokes(self, height: int, width: int, chances: list[float], device: torch.device) -> Tensor:
        low, high = self.brush_share
        # A point is at most sqrt(1/2) pixels from the nearest pixel; a larger radius always covers one.
        radius = max(0.75, min(height, width) * (low + (high - low) * chances[1]) / 2)
        count = 1 + math.floor(chances[2] * self.num_strokes)
        points = torch.tensor(chances[5 : 5 + 2 * (count + 1)], device=device).view(count + 1, 2)
        points = points * torch.tensor([height - 1, width - 1], device=device)
        rows = torch.arange(height, device=device, dtype=torch.float32)
        columns = torch.arange(width, device=device, dtype=torch.float32)
        pixels = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)  # (H, W, 2)
        hole = torch.zeros(height, width, dtype=torch.bool, device=device)
        for start, end in zip(points[:-1], points[1:], strict=True):
            along = end - start
            # Nearest point on the segment for each pixel, as a fraction of its length.
            place = ((pixels - start) @ along / along.dot(along).clamp(min=1e-6)).clamp(0, 1)
            distance = (pixels - start - place.unsqueeze(-1) * along).norm(dim=-1)
            hole |= distance <= radius
        return hole.float()


MASKS.register_module(name="RandomMasks", module=RandomMasks)
