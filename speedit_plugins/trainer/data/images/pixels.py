"""Reads image files as upright 8-bit RGB, whatever their mode and bit depth.

Dims: H x W pixels.
"""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, features
from torch import Tensor

# Suffixes of pictures. Pillow reads HEIC with a plugin only, and some others only if it was built for them.
_PICTURES = (
    ".apng",
    ".avif",
    ".bmp",
    ".gif",
    ".heic",
    ".heif",
    ".j2k",
    ".jfif",
    ".jp2",
    ".jpe",
    ".jpeg",
    ".jpg",
    ".jpx",
    ".pbm",
    ".pgm",
    ".png",
    ".pnm",
    ".ppm",
    ".qoi",
    ".tga",
    ".tif",
    ".tiff",
    ".webp",
)
_CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}
# Formats whose 16-bit grey levels fill the whole range: Pillow scales those of PPM and JPEG 2000 itself.
_FULL_RANGE = ("JPEG2000", "PNG", "PPM")
BIT_DEPTHS = range(8, 33)
# TIFF tags: the size in pixels, bits of a level, whether 0 is white, the largest level, signed or not.
IMAGE_WIDTH, IMAGE_LENGTH, BITS, PHOTOMETRIC, MAX_LEVEL, SAMPLE_FORMAT, SIGNED_MAX = (
    256,
    257,
    258,
    262,
    281,
    339,
    341,
)
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


def readable_suffixes() -> tuple[str, ...]:
    """Suffixes of the picture formats that this Pillow reads, in lower case, sorted.

    HEIC needs a plugin that registers with Pillow, such as the module `pillow_heif.HeifImagePlugin`.
    """
    Image.init()
    formats = Image.registered_extensions()

    def is_readable(suffix: str) -> bool:
        found = formats.get(suffix)
        return found in Image.OPEN and (found not in _CODECS or bool(features.check(_CODECS[found])))

    return tuple(filter(is_readable, _PICTURES))


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


def read_rgb(path: Path | BinaryIO, *, bit_depth: int | None = None) -> Image.Image:
    """Reads a file as an upright 8-bit RGB image at its own size.

    Applies the EXIF orientation. Transparent pixels are blended onto white, since the colour stored under
    them is arbitrary. An animation gives its first frame.

    Grey levels of more than 8 bits are scaled from 0..top to 0..255. For PNG, PPM and JPEG 2000, `top` is
    65535. For TIFF it follows from the tags for bits per sample and the largest level. The range of other
    32-bit integers, and of floating-point pixels, is unknown.

    Args:
        path: the file, or its content; messages name it by its text.
        bit_depth: bits of a grey level in files that store more than 8, in BIT_DEPTHS; None takes the file's
            word. A camera's 12-bit levels in a 16-bit file need 12.

    Raises:
        ValueError: the file is damaged or not an image, its range is unknown, or a level is out of range;
            names the file.
        OSError: the system fails to read the file.

    Warns:
        UserWarning: the levels of a 16-bit image fit into 12 bits; once per process.
    """
    with _naming_damage(path), Image.open(path) as image:
        upright = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _grey_to_rgb(upright, _top_level(image, bit_depth), image, path, is_told=bool(bit_depth))
        return _to_rgb(upright)


@contextmanager
def _naming_damage(path: Path | BinaryIO) -> Iterator[None]:
    """Turns decoding errors into a ValueError that names the file; errors of the system pass unchanged."""
    try:
        yield
    except DECODE_ERRORS as error:
        # An OSError with an errno comes from the system (disk, permission); Pillow's own ones have none.
        if isinstance(error, OSError) and error.errno is not None:
            if error.filename is not None:
                raise
            # A read that fails names no file.
            raise OSError(error.errno, f"cannot read {path}: {error.strerror}") from error
        raise ValueError(f"corrupt image {path}: {type(error).__name__}: {error}") from error


def as_tensor(image: Image.Image) -> Tensor:
    """An RGB image as float32 (3, H, W), with 0 to 255 scaled to [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32)  # (H, W, 3)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode == "F":
        raise ValueError("wanted an 8-bit or 16-bit image, got floating-point pixels, whose range is unknown")
    return image.convert("RGB")


def _grey_to_rgb(
    upright: Image.Image, top: int, file: Image.Image, path: Path | BinaryIO, *, is_told: bool
) -> Image.Image:
    """Grey levels 0..top as RGB. Pillow's own conversion clips at 255: nearly all pixels become white."""
    grey = np.asarray(upright).astype(np.int64)
    if grey.min() < 0 or grey.max() > top:
        raise ValueError(f"grey levels must be in 0..{top}, got {grey.min()}..{grey.max()}")
    if top == 0xFFFF and not is_told and 0 < grey.max() <= 0xFFF:
        _warn_of_dim_levels(path, int(grey.max()))
    if isinstance(file, TiffImagePlugin.TiffImageFile) and file.tag_v2.get(PHOTOMETRIC) == 0:
        grey = top - grey
    levels = np.round(grey * (255 / top)).astype(np.uint8)
    # One level may stand for transparent pixels.
    if isinstance(clear := file.info.get("transparency"), int):
        levels[np.asarray(upright) == clear] = 255
    return Image.fromarray(levels).convert("RGB")


def _top_level(image: Image.Image, bit_depth: int | None) -> int:
    """The grey level that is white in a file of more than 8 bits per level."""
    if bit_depth is not None:
        return 2**bit_depth - 1
    if image.format in _FULL_RANGE:
        return 0xFFFF
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    stated = _first(tags.get(SIGNED_MAX, tags.get(MAX_LEVEL)))
    if stated is not None and stated > 0:
        return int(stated)
    bits, is_signed = _first(tags.get(BITS)), _first(tags.get(SAMPLE_FORMAT)) == 2
    if bits is None or bits > 16:
        raise ValueError(
            f"wanted an 8-bit or 16-bit image, got {int(bits or 32)}-bit integers, whose range is unknown;"
            " bit_depth says how many bits a level has"
        )
    return int(2 ** (bits - is_signed) - 1)


def _first(value: object) -> float | None:
    """The value of a TIFF tag; it may be stored as a tuple."""
    found = value[0] if isinstance(value, tuple) and value else value
    return float(found) if isinstance(found, int | float) else None


_warned: set[str] = set()


def _warn_of_dim_levels(path: Path | BinaryIO, most: int) -> None:
    # Once: a folder of such files would print a line for each.
    if _warned:
        return
    _warned.add("dim")
    warnings.warn(
        f"{path} is nearly black: its levels go up to {most} of 65535. If a level has fewer than 16 bits,"
        " bit_depth: 12 (or as many as it has) scales it; this is said once",
        UserWarning,
        stacklevel=5,
    )
