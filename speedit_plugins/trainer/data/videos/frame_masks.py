"""Random masks for inpainting videos: holes in time.

Dims: F frames.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from speedit_plugins.registry import MASKS

# Which frames are given: the first, the last, the first and the last, or any.
WAYS = ("future", "past", "between", "scattered")


class FrameMasks:
    """Masks of whole frames: some frames are given, and the model fills the others.

    One model learns several tasks, as in Voleti et al. 2022 (MCVD), arXiv:2205.09853, and Hoeppe et al. 2022
    (RaMViD), arXiv:2206.07696.

    Args:
        ways: what is filled, drawn evenly for each video: "future" behind the first frames (prediction),
            "past" before the last ones, "between" the first and the last ones (interpolation), or "scattered"
            frames anywhere.
        given: smallest and largest number of given frames, >= 1; with "between", at each of the two ends.

    Raises:
        ValueError: a value out of range, or an unknown way.
    """

    def __init__(
        self, *, ways: Sequence[str] = ("future", "between"), given: tuple[int, int] = (1, 1)
    ) -> None:
        if isinstance(ways, str) or not ways or len(set(ways)) < len(ways) or not set(ways) <= set(WAYS):
            raise ValueError(f"FrameMasks needs ways, each one of {', '.join(WAYS)}, once, got {ways!r}")
        is_pair = isinstance(given, Sequence) and len(given) == 2 and all(type(n) is int for n in given)
        if not is_pair or not 1 <= given[0] <= given[1]:
            raise ValueError(f"FrameMasks needs given = (low, high) with 1 <= low <= high, got {given!r}")
        self.ways, self.given = tuple(ways), tuple(given)

    def draw_frames(self, num_frames: int, generator: torch.Generator) -> Tensor:
        """A mask, float32 (F,), on the generator's device: 1 for the frames to fill, at least one, else 0.

        Raises:
            ValueError: so few frames may leave none to fill.
        """
        low, high = self.given
        most = high * (2 if "between" in self.ways else 1)
        if most >= num_frames:
            raise ValueError(
                f"FrameMasks may give {most} frames, and needs videos of more, got {num_frames}; wanted other"
                " given or ways, or more frames"
            )
        device = generator.device
        chances = torch.rand(2 + num_frames, generator=generator, device=device)
        way = self.ways[int(chances[0] * len(self.ways))]
        number = low + int(chances[1] * (high - low + 1))
        hole = torch.ones(num_frames, device=device)
        if way in ("future", "between"):
            hole[:number] = 0
        if way in ("past", "between"):
            hole[-number:] = 0
        if way == "scattered":
            hole[chances[2:].argsort()[:number]] = 0
        return hole


MASKS.register_module(name="FrameMasks", module=FrameMasks)
