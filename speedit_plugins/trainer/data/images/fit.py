"""Fits an image of any size into the height and width of a sample.

Dims: H x W pixels of a sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageColor

FITS = ("crop", "pad", "random_crop")
PAD_COLOR = "black"
# Which part a crop keeps, from left to right and from top to bottom, each in [0, 1); None is the centre.
Place = tuple[float, float] | None


@dataclass(frozen=True)
class Fit:
    """How an image becomes a sample of H x W pixels.

    Args:
        name: "crop" scales the image until it covers the sample and keeps the centre. "random_crop" keeps a
            random part instead. "pad" scales it until it lies within the sample, and fills the rest (a
            letterbox).
        pad_color: the filling: a name, "#rrggbb", or three numbers in 0..255; None is black.

    Raises:
        ValueError: an unknown name, an invalid colour, or a colour without "pad".
    """

    name: str = "crop"
    pad_color: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.name not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {self.name!r}")
        if self.pad_color is not None and self.name != "pad":
            raise ValueError(f"pad_color has no effect with fit: {self.name}; wanted fit: pad")
        _ = self.color

    @property
    def color(self) -> tuple[int, int, int]:
        """Red, green and blue of the filling, in 0..255."""
        given = PAD_COLOR if self.pad_color is None else self.pad_color
        try:
            found = ImageColor.getrgb(given) if isinstance(given, str) else tuple(given)
        except (TypeError, ValueError):
            found = ()
        if len(found) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in found):
            raise ValueError(
                f"pad_color must be a name, '#rrggbb' or three numbers in 0..255, got {self.pad_color!r}"
            )
        return found[0], found[1], found[2]

    def draw(self, generator: torch.Generator) -> Place:
        """The part that is kept. Only "random_crop" uses random numbers: two."""
        if self.name != "random_crop":
            return None
        right, down = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        return right, down

    def apply(self, image: Image.Image, height: int, width: int, place: Place = None) -> Image.Image:
        """The image at height x width pixels."""
        if self.name == "pad":
            return letterbox(image, height, width, self.color)
        return crop(image, height, width, place)


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scales the image until it just covers height x width pixels, then crops the centre.

    The image is first halved by box averaging for as long as it still covers the target, then resized to it
    by bicubic interpolation.

    Source: the preprocessing of ADM, Dhariwal and Nichol 2021, arXiv:2105.05233 (openai/guided-diffusion),
    extended from squares to rectangles.
    """
    return crop(image, height, width, None)


def crop(image: Image.Image, height: int, width: int, place: Place) -> Image.Image:
    """As `center_crop`, but keeps the part at `place`."""
    image = _scaled(image, height, width, max)
    spare = image.width - width, image.height - height
    left, top = (room // 2 for room in spare)
    if place is not None:
        left, top = (int((room + 1) * share) for room, share in zip(spare, place, strict=True))
    return image.crop((left, top, left + width, top + height))


def letterbox(image: Image.Image, height: int, width: int, color: tuple[int, int, int]) -> Image.Image:
    """Scales the image until it just lies within height x width pixels, in the middle of `color`."""
    image = _scaled(image, height, width, min)
    filled = Image.new("RGB", (width, height), color)
    filled.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return filled


def _scaled(
    image: Image.Image, height: int, width: int, pick: Callable[[float, float], float]
) -> Image.Image:
    """The image scaled by the larger (`max`) or smaller (`min`) of the two ratios of sides."""
    columns, rows = image.size
    while pick(width / columns, height / rows) <= 0.5 and min(columns, rows) > 1:
        columns, rows = columns // 2, rows // 2
        image = image.resize((columns, rows), resample=Image.Resampling.BOX)
    scale = pick(width / columns, height / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    return image.resize(size, resample=Image.Resampling.BICUBIC)
