"""A small dataset of captioned images that needs no download: emoji and their names.

Dims: N images, H x W pixels.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify

# Made by tools/build_emoji.py; EMOJI_ATTRIBUTION.md in the same folder lists its sources.
SOURCE = Path(__file__).parents[1] / "assets" / "emoji_32.npz"
SOURCE_SIZE = 32
IMAGE_SIZES = (16, 32)
# The source orders emoji by subject: every tenth one goes to the test split, so that it covers all subjects.
TEST_EVERY = 10
SPLITS = ("all", "train", "test")


class Emoji:
    """1,911 RGB emoji of 32 x 32 pixels on white; the caption is the emoji's name in lower case.

    Source: Twemoji's images with Unicode's names, such as "grinning face" and "flag: france". They are in
    Unicode's order, without skin-tone variants.

    Args:
        image_size: 32; 16 averages each 2 x 2 pixels.
        random_flip: mirror left to right with probability 1/2. Names that mention left or right then become
            wrong for mirrored images.
        split: "all", "test" for every tenth image, "train" for the rest.
    """

    channels = 3
    num_classes = 0

    def __init__(
        self, *, image_size: int = SOURCE_SIZE, random_flip: bool = False, split: str = "all"
    ) -> None:
        if image_size not in IMAGE_SIZES:
            raise ValueError(f"Emoji needs image_size in {IMAGE_SIZES}, got {image_size}")
        if split not in SPLITS:
            raise ValueError(f"Emoji needs split in {SPLITS}, got {split!r}")
        self.image_size = image_size
        self.random_flip = random_flip
        self.split = split
        pixels, names = _read_emoji()  # (N, 3, 32, 32), N names
        is_test = torch.arange(len(names)) % TEST_EVERY == TEST_EVERY - 1
        part = {"all": torch.ones_like(is_test), "train": ~is_test, "test": is_test}[split]
        self.captions = [name for name, is_in in zip(names, part.tolist(), strict=True) if is_in]
        self._pixels = pixels[part]

    def __len__(self) -> int:
        return len(self.captions)

    def identity(self) -> dict[str, str]:
        """A constant for each split: the emoji come with this package."""
        return identify(contents=["Emoji", self.split])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "caption" str.

        `generator` decides the flip.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Emoji has {len(self)} images, got index {index}")
        image = self._pixels[index].float() / 127.5 - 1.0
        image = functional.avg_pool2d(image, SOURCE_SIZE // self.image_size)  # (3, H, W)
        if self.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return {"image": image, "caption": self.captions[index]}


def _read_emoji() -> tuple[Tensor, list[str]]:
    """Pixels, uint8 (N, 3, 32, 32), and N names."""
    with np.load(SOURCE, allow_pickle=False) as arrays:
        pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        return pixels, arrays["captions"].tolist()


DATASETS.register_module(name="Emoji", module=Emoji)
