"""Images from a folder, with or without classes, at one size or in aspect-ratio buckets.

Dims: H x W pixels after the crop, N images.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

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
# TIFF tags of the size in pixels.
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257
# EXIF orientations that turn the image by 90 degrees.
SIDEWAYS = (5, 6, 7, 8)
# Errors that Pillow's decoders raise on damaged data.
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
    """Images below `root`, centre-cropped as in ADM, sorted by class name and then by path.

    With classes, the layout is ImageNet's: one folder per class directly below `root`; images may be nested
    deeper inside. Labels follow the sorted folder names. Without classes, all images at any depth are used
    and every label is 0. Hidden names (a leading dot) and files without an image suffix are skipped.

    With buckets, an image goes to the bucket with the nearest aspect ratio. It is scaled to cover the bucket
    and cropped to it. Creating the dataset then reads the header of every file. The attribute `buckets` holds
    the bucket index of each image, int64 (N,); without buckets it is None.

    Args:
        root: the folder; may be a symbolic link.
        image_size: side of the square crop in pixels, >= 1. With buckets it does not affect training; it is
            the size of the images that an experiment samples.
        class_cond: take labels from folder names; False for unconditional training.
        random_flip: mirror left to right with probability 1/2.
        on_corrupt: what to do with a damaged file. "raise" raises and names it. "skip" warns once per file
            and uses the next readable image with its label instead, within the same bucket. A damaged header
            counts as a square image. Failures of the system (permission, disk) always raise.
        follow_links: True allows symbolic links that lead out of `root`.
        buckets: [height, width] of each bucket in pixels, all of different aspect ratios; None crops every
            image to the square.

    Raises:
        ValueError: the folder is missing or has no images; its layout does not fit `class_cond`; a link leads
            out of `root`, to nothing or in a circle; buckets are invalid; or, with buckets and "raise", an
            image header is damaged.
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
            raise ValueError(f"ImageFolder needs root to be a folder, got {self.root}")
        self.image_size = image_size
        self.random_flip = random_flip
        self.on_corrupt = on_corrupt
        # The root itself may be a link; only links below it are checked.
        walk = Walk(self.root.resolve(), follow_links=follow_links, suffixes=SUFFIXES)
        self.classes, paths, labels = _with_classes(walk) if class_cond else _without_classes(walk)
        self.num_classes = len(self.classes)
        self._paths = Strings(paths)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._sides = [(image_size, image_size)] if buckets is None else checked_sides(buckets)
        self.buckets = None if buckets is None else self._nearest_buckets()
        # In shared memory, so that all workers together count each damaged file once.
        self._corrupt = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def num_corrupt(self) -> int:
        """Number of damaged files found so far by all workers."""
        return int(self._corrupt.sum())

    def path(self, index: int) -> Path:
        """Path of the image at `index`."""
        return Path(self._paths[index])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "label" int.

        `generator` decides the flip.

        Raises:
            ValueError: the file is damaged and on_corrupt is "raise", or it is "skip" and no file (of this
                bucket) is readable.
            OSError: the system fails to read the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} images, got index {index}")
        # Decided before the file is read, so that a damaged file does not change later random numbers.
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        image, index = self._read(index)
        height, width = self._sides[0 if self.buckets is None else int(self.buckets[index])]
        scaled = as_tensor(center_crop(image, height, width))  # (3, H, W)
        return {"image": scaled.flip(-1) if flip else scaled, "label": int(self.labels[index])}

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """The image at `index`, or the next readable one of the bucket (cyclically), and its index."""
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
                warnings.warn(f"{error}; using the next readable image instead", UserWarning, stacklevel=3)
        where = f"below {self.root}"
        if self.buckets is not None:
            where += f" in the bucket {list(self._sides[int(self.buckets[index])])}"
        num_damaged = sum(self._shares_bucket(index, other) for other in range(len(self)))
        raise ValueError(
            f"{type(self).__name__} found no readable image: all {num_damaged} files {where} are damaged"
        )

    def _shares_bucket(self, index: int, other: int) -> bool:
        return self.buckets is None or bool(self.buckets[index] == self.buckets[other])

    def _nearest_buckets(self) -> Tensor:
        """Bucket index of each image, from the size in its header, int64 (N,)."""
        ratios = torch.empty(len(self), dtype=torch.float64)
        for index in range(len(self)):
            try:
                height, width = read_size(self.path(index))
            except ValueError:
                if self.on_corrupt == "raise":
                    raise
                # `load` will warn about this file and replace it with another one of the square's bucket.
                height = width = self.image_size
            ratios[index] = height / width
        return nearest_buckets(ratios, self._sides)


def read_size(path: Path | BinaryIO) -> tuple[int, int]:
    """Height and width of the upright image in pixels; reads only the file's header.

    Raises:
        ValueError: the file is not an image or its header is damaged; names the file.
        OSError: the system fails to read the file.
    """
    with _naming_damage(path), Image.open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # The stored size: `image.size` is already the upright one in newer versions of Pillow.
            width, height = image.tag_v2[IMAGE_WIDTH], image.tag_v2[IMAGE_LENGTH]
        # PNG's own getexif decodes the whole image to find EXIF data stored after the pixels. This one does
        # not: a PNG with EXIF data there may end up in a worse bucket.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    return (width, height) if orientation in SIDEWAYS else (height, width)


def read_rgb(path: Path | BinaryIO) -> Image.Image:
    """Reads a file as an upright 8-bit RGB image at its own size.

    Applies the EXIF orientation. Transparent pixels are blended onto white, since the colour stored under
    them is arbitrary. 16-bit grey is rescaled to 8 bits. An animation gives its first frame.

    Raises:
        ValueError: the file is damaged or not an image; names the file.
        OSError: the system fails to read the file.
    """
    with _naming_damage(path), Image.open(path) as image:
        return _to_rgb(ImageOps.exif_transpose(image))


@contextmanager
def _naming_damage(path: Path | BinaryIO) -> Iterator[None]:
    """Turns decoding errors into a ValueError that names the file; errors of the system pass unchanged."""
    try:
        yield
    except DECODE_ERRORS as error:
        # An OSError with an errno comes from the system (disk, permission); Pillow's own ones have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"corrupt image {path}: {type(error).__name__}: {error}") from error


def center_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scales the image until it just covers height x width pixels, then crops the centre.

    The image is first halved by box averaging for as long as it still covers the target, then resized to it
    by bicubic interpolation.

    Source: the preprocessing of ADM, Dhariwal and Nichol 2021, arXiv:2105.05233 (openai/guided-diffusion),
    extended from squares to rectangles.
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


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W), with 0 to 255 scaled to [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: Pillow's own conversion clips at 255, so nearly all pixels would become white.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError(f"grey levels must fit in 16 bits, got {grey.min()}..{grey.max()}")
        image = Image.fromarray(np.round(grey / 257.0).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "F":
        raise ValueError("wanted an 8-bit or 16-bit image, got floating-point pixels, whose range is unknown")
    return image.convert("RGB")


def _with_classes(walk: Walk) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names, paths and labels of a folder in the ImageNet layout."""
    folders, stray = walk.entries(str(walk.root))
    if stray:
        raise ValueError(
            f"class_cond=True needs one folder per class below {walk.root}, got an image directly in it: "
            f"{stray[0]}; class_cond=False uses images at any depth, without labels"
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
    """No class names, all paths, and label 0 for each."""
    paths = list(walk.files(str(walk.root)))
    if not paths:
        raise ValueError(f"ImageFolder found no images below {walk.root} (suffixes: {', '.join(SUFFIXES)})")
    return (), paths, [0] * len(paths)


DATASETS.register_module(name="ImageFolder", module=ImageFolder)
