"""Images from a folder: with classes in the ImageNet layout, or without; of one size, or in buckets.

Dims: H x W pixels after the crop, N images.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin
from torch import Tensor

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.buckets import checked_sides, nearest_buckets
from speedit_plugins.trainer.data.folders import Walk
from speedit_plugins.trainer.data.strings import Strings

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
ON_CORRUPT = ("raise", "skip")
# Of TIFF, in pixels.
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257
# EXIF orientations that swap height and width.
SIDEWAYS = (5, 6, 7, 8)
# What Pillow's decoders raise on damaged data.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageFolder:
    """Images below `root`, centre-cropped as in ADM, in a fixed order: by class name, then by path.

    With classes the layout is ImageNet's: one folder per class directly below `root`, labels in the order of
    the sorted folder names; images may lie deeper in it. Without, every image at any depth counts and every
    label is 0. Names that begin with a dot and files that are no images by their suffix are left out.

    With buckets, an image is scaled to cover the one of the nearest aspect ratio and cropped to it; this
    reads the header of every file. `buckets` then holds the bucket of each image, int64 (N,), else None.

    Args:
        root: the folder; may itself be a link.
        image_size: side of the square crop in pixels, >= 1. With buckets nothing is cropped to it: it is the
            size of what an experiment samples.
        class_cond: labels from folder names; False for an unconditional set.
        random_flip: mirror left to right with probability 1/2.
        on_corrupt: "raise" names a damaged file; "skip" takes the next readable image, with that image's
            label, and warns once per file. A file that the system fails to read (permission, disk) raises.
            With buckets it is the next one of its bucket; a damaged header counts as that of a square.
        follow_links: True allows symbolic links that lead out of `root`.
        buckets: [height, width] of each, in pixels, of different aspect ratios; None crops to the square.

    Raises:
        ValueError: no such folder, no images, a layout that does not fit `class_cond`, a link that leads out
            of `root`, to nothing or in a circle, unusable buckets, with them a damaged header ("raise").
        OSError: with buckets, the system fails to read a file.
    """

    channels = 3

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int,
        class_cond: bool = True,
        random_flip: bool = True,
        on_corrupt: str = "raise",
        follow_links: bool = False,
        buckets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not isinstance(root, str | os.PathLike):
            raise ValueError(f"ImageFolder needs root to be a path, got {root!r}")
        if image_size < 1:
            raise ValueError(f"ImageFolder needs image_size >= 1, got {image_size}")
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"ImageFolder needs on_corrupt in {ON_CORRUPT}, got {on_corrupt!r}")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"ImageFolder needs a folder as root, got {self.root}, which is none")
        self.image_size = image_size
        self.random_flip = random_flip
        self.on_corrupt = on_corrupt
        # Resolved once: a root that is a link stands for the folder it leads to.
        walk = Walk(self.root.resolve(), follow_links=follow_links, suffixes=SUFFIXES)
        self.classes, paths, labels = _with_classes(walk) if class_cond else _without_classes(walk)
        self.num_classes = len(self.classes)
        self._paths = Strings(paths)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._sides = [(image_size, image_size)] if buckets is None else checked_sides(buckets)
        self.buckets = None if buckets is None else self._nearest_buckets()
        # Shared memory, so that the workers and this process count each damaged file once.
        self._corrupt = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def num_corrupt(self) -> int:
        """Damaged files met so far, by all workers together."""
        return int(self._corrupt.sum())

    def path(self, index: int) -> Path:
        """The file behind `index`."""
        return Path(self._paths[index])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "label" int.

        `generator` decides the flip.

        Raises:
            ValueError: a damaged file with on_corrupt="raise", or with "skip" no readable one at all (of its
                bucket).
            OSError: the system fails to read the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} images, got index {index}")
        # Drawn before the file is read: a damaged file does not move the stream.
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        image, index = self._read(index)
        height, width = self._sides[0 if self.buckets is None else int(self.buckets[index])]
        pixels = np.asarray(center_crop(image, height, width), dtype=np.float32)  # (H, W, 3)
        if flip:
            pixels = pixels[:, ::-1]
        scaled = torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()  # (3, H, W)
        return {"image": scaled, "label": int(self.labels[index])}

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """The image at `index`, or the next readable one of its bucket (cyclically), with its index."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._corrupt[candidate] or not self._shares_bucket(index, candidate):
                continue
            path = self.path(candidate)
            try:
                return read_rgb(path), candidate
            except ValueError as error:
                if self.on_corrupt == "raise":
                    raise
                self._corrupt[candidate] = True
                warnings.warn(f"{error}; the next readable image takes its place", UserWarning, stacklevel=3)
        where = f"below {self.root}"
        if self.buckets is not None:
            where += f" of the bucket {list(self._sides[int(self.buckets[index])])}"
        num_damaged = sum(self._shares_bucket(index, other) for other in range(len(self)))
        raise ValueError(
            f"{type(self).__name__} found no readable image: all {num_damaged} files {where} are damaged"
        )

    def _shares_bucket(self, index: int, other: int) -> bool:
        return self.buckets is None or bool(self.buckets[index] == self.buckets[other])

    def _nearest_buckets(self) -> Tensor:
        """The bucket of each image by its header, int64 (N,)."""
        ratios = torch.empty(len(self), dtype=torch.float64)
        for index in range(len(self)):
            try:
                height, width = read_size(self.path(index))
            except ValueError:
                if self.on_corrupt == "raise":
                    raise
                # `load` warns of the file, and replaces it by one of this bucket.
                height = width = self.image_size
            ratios[index] = height / width
        return nearest_buckets(ratios, self._sides)


def read_size(path: Path) -> tuple[int, int]:
    """Height and width of the upright image in pixels, from the file's header alone.

    Raises:
        ValueError: the header is damaged or of no image; names the file.
        OSError: the system fails to read the file.
    """
    with _naming_damage(path), Image.open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # Of the stored picture in every version: newer ones of Pillow give the upright size here.
            width, height = image.tag_v2[IMAGE_WIDTH], image.tag_v2[IMAGE_LENGTH]
        # The PNG plugin's own getexif decodes the picture, in search of a record behind it; one there is not
        # seen here, which costs such a file the better bucket.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in SIDEWAYS else (height, width)


def read_rgb(path: Path) -> Image.Image:
    """The file as an upright 8-bit RGB image of its own size.

    EXIF orientation is applied; transparency is laid over white, since the colour under it is arbitrary;
    16-bit grey keeps its high byte's scale; an animation gives its first frame.

    Raises:
        ValueError: the file is damaged or no image; names the file.
        OSError: the system fails to read the file.
    """
    with _naming_damage(path), Image.open(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """What a decoder raises inside, as a ValueError that names the file; a failing system as it is."""
    try:
        yield
    except DECODE_ERRORS as error:
        # Pillow's own complaints carry no errno; one that does is a failing disk or a permission, not damage.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"corrupt image {path}: {type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The central rectangle of height x width pixels, scaled so that the image just covers it.

    The image is halved by box averages while it then still covers it, brought to it by bicubic
    interpolation, then cropped.

    Source: the preprocessing of ADM, Dhariwal and Nichol 2021, arXiv:2105.05233 (openai/guided-diffusion),
    which has squares alone.
    """
    columns, rows = image.size
    while columns >= 2 * width and rows >= 2 * height:
        columns, rows = columns // 2, rows // 2
        image = image.resize((columns, rows), resample=Image.Resampling.BOX)
    scale = max(width / columns, height / rows)
    columns, rows = round(columns * scale), round(rows * scale)
    image = image.resize((columns, rows), resample=Image.Resampling.BICUBIC)
    left, top = (columns - width) // 2, (rows - height) // 2
    return image.crop((left, top, left + width, top + height))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255, which turns the picture white.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey levels {grey.min()}..{grey.max()}, wanted at most 16 bits")
        image = Image.fromarray(np.round(grey / 257.0).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range; wanted an 8-bit or 16-bit image")
    return image.convert("RGB")


def _with_classes(walk: Walk) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, paths and labels of the ImageNet layout."""
    folders, stray = walk.entries(str(walk.root))
    if stray:
        raise ValueError(
            f"class_cond=True needs one folder per class below {walk.root}, got an image directly in it: "
            f"{stray[0]}; class_cond=False takes images of any depth without labels"
        )
    if not folders:
        raise ValueError(f"class_cond=True needs one folder per class below {walk.root}, got no folder")
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = list(walk.files(folder))
        if not found:
            raise ValueError(f"the class folder {folder} has no images (suffixes: {', '.join(SUFFIXES)})")
        paths += found
        labels += [label] * len(found)
    return tuple(os.path.basename(folder) for folder in folders), paths, labels


def _without_classes(walk: Walk) -> tuple[tuple[str, ...], list[str], list[int]]:
    """The same without class names; every label is 0."""
    paths = list(walk.files(str(walk.root)))
    if not paths:
        raise ValueError(f"ImageFolder found no images below {walk.root} (suffixes: {', '.join(SUFFIXES)})")
    return (), paths, [0] * len(paths)


DATASETS.register_module(name="ImageFolder", module=ImageFolder)
