"""A small dataset of captioned images that needs no download: emoji and their names.

Dims: N images, H x W pixels.
"""

import io
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify

# Made by tools/build_emoji.py; EMOJI_ATTRIBUTION.md in the same folder lists its sources.
SOURCE = Path(__file__).parents[1] / "assets" / "emoji_64.npz"
SOURCE_SIZE = 64
IMAGE_SIZES = (16, 32, 64)
# The source orders emoji by subject: every tenth one goes to the test split, so that it covers all subjects.
TEST_EVERY = 10
SPLITS = ("all", "train", "test")


class Emoji:
    """1,911 RGB emoji of up to 64 x 64 pixels on white; the caption is the emoji's name in lower case.

    Source: Twemoji's images with Unicode's names, such as "grinning face" and "flag: france". They are in
    Unicode's order, without skin-tone variants.

    Args:
        image_size: 64; 32 averages each 2 x 2 pixels and rounds, and 16 averages 2 x 2 of those.
        random_flip: mirror left to right with probability 1/2. Names that mention left or right then become
            wrong for mirrored images.
        split: "all", "test" for every tenth image, "train" for the rest.
    """

    channels = 3
    num_classes = 0

    def __init__(self, *, image_size: int = 32, random_flip: bool = False, split: str = "all") -> None:
        if image_size not in IMAGE_SIZES:
            raise ValueError(f"Emoji needs image_size in {IMAGE_SIZES}, got {image_size}")
        if split not in SPLITS:
            raise ValueError(f"Emoji needs split in {SPLITS}, got {split!r}")
        self.image_size = image_size
        self.random_flip = random_flip
        self.split = split
        names = _read_emoji()[1]
        is_test = torch.arange(len(names)) % TEST_EVERY == TEST_EVERY - 1
        part = {"all": torch.ones_like(is_test), "train": ~is_test, "test": is_test}[split]
        self.captions = [name for name, is_in in zip(names, part.tolist(), strict=True) if is_in]
        self._pixels = _pixels(max(image_size, SOURCE_SIZE // 2))[part]  # (N, 3, 64 or 32, 64 or 32)

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
        image = functional.avg_pool2d(image, image.shape[-1] // self.image_size)  # (3, H, W)
        if self.random_flip and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)
        return {"image": image, "caption": self.captions[index]}


def halved(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mean of each 2 x 2 pixels, rounded to the nearest: (N, H, W, 3) -> (N, H / 2, W / 2, 3)."""
    wide = pixels.astype(np.uint16)
    rows = wide[:, ::2] + wide[:, 1::2]
    # A half goes to the even number, as np.rint has it.
    return np.rint((rows[:, :, ::2] + rows[:, :, 1::2]) / np.float32(4)).astype(np.uint8)


def read_sheet(content: bytes, number: int) -> NDArray[np.uint8]:
    """The first images of a sheet, row by row, uint8 (N, 64, 64, 3).

    Args:
        content: an image that is tiled by those of 64 x 64 pixels.
        number: N.
    """
    with Image.open(io.BytesIO(content)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    rows, columns = (length // SOURCE_SIZE for length in pixels.shape[:2])
    cells = pixels.reshape(rows, SOURCE_SIZE, columns, SOURCE_SIZE, 3).transpose(0, 2, 1, 3, 4)
    return cells.reshape(-1, SOURCE_SIZE, SOURCE_SIZE, 3)[:number]


# Kept, since unpacking takes half a second, and the datasets of a run share the pixels.
@cache
def _read_emoji() -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Pixels, uint8 (N, 64, 64, 3), and N names."""
    with np.load(SOURCE, allow_pickle=False) as arrays:
        names = tuple(arrays["captions"].tolist())
        return read_sheet(arrays["sheet"].tobytes(), len(names)), names


@cache
def _pixels(side: int) -> Tensor:
    """uint8 (N, 3, side, side) for a side of 64 or 32."""
    pixels = _read_emoji()[0]
    pixels = pixels if side == SOURCE_SIZE else halved(pixels)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


DATASETS.register_module(name="Emoji", module=Emoji)
