"""The hole in a sample, drawn by what a config names under `inpainting`.

Masks say by their methods what they can do:

- holes in space, of images and of all frames of videos: `draw(height, width, generator)` -> (H, W);
- holes in time, of videos: `draw_frames(num_frames, generator)` -> (F,);
- holes in solids: `draw_solid(sides, generator)` -> (D, H, W).

Each mask is 1 in the hole and 0 elsewhere.

Dims: F frames, H x W pixels; D x H x W voxels.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE, VIDEO, VOXELS = "image", "video", "voxels"
"""Keys of samples that can have a hole, in a batch."""
_METHODS = {IMAGE: ("draw",), VIDEO: ("draw_frames", "draw"), VOXELS: ("draw_solid",)}


def hole_key(batch: Mapping[str, Any]) -> str:
    """The key of the samples that can have a hole, in a batch or a sample; ValueError if there is none."""
    key = next((key for key in (IMAGE, VIDEO, VOXELS) if key in batch), None)
    if key is None:
        got = ", ".join(sorted(batch))
        raise ValueError(f"inpainting needs images, videos or voxels, got batches of {got}")
    return key


def draw_hole(masks: Any, key: str, sides: Sequence[int], generator: torch.Generator) -> Tensor:
    """A mask of a whole sample, float32, 1 in the hole.

    Args:
        masks: of the config.
        key: IMAGE, VIDEO or VOXELS.
        sides: (H, W), (F, H, W) or (D, H, W), those of the mask too.
        generator: draws it, on its device.

    Raises:
        ValueError: the masks are not for such samples, or do not fit the sides.
    """
    method = next((name for name in _METHODS[key] if hasattr(masks, name)), None)
    if method is None:
        name, wanted = type(masks).__name__, " or ".join(_METHODS[key])
        what = {IMAGE: "images", VIDEO: "videos", VOXELS: "voxels"}[key]
        raise ValueError(f"inpainting: {name} makes no holes in {what}; wanted masks with {wanted}")
    if method == "draw_solid":
        mask = masks.draw_solid(sides, generator)
    elif method == "draw_frames":
        mask = masks.draw_frames(sides[0], generator)[:, None, None]
    else:
        mask = masks.draw(*sides[-2:], generator)
    hole: Tensor = mask.expand(*sides)
    return hole
