"""Builds the emoji dataset from two npm packages: one has the images, the other the names.

    npm pack emoji-datasource-twitter@16.0.0
    npm pack emojibase-data@16.0.3
    python tools/build_emoji.py --images emoji-datasource-twitter-16.0.0.tgz \\
        --names emojibase-data-16.0.3.tgz --output speedit_plugins/trainer/data/assets/emoji_64.npz

Another vendor's emoji are read from emoji-datasource-VENDOR, with --vendor. The file has the emoji as one
lossless WebP image; writing it takes two minutes. With --side 32 it has an array of smaller images. The
pixels depend only on the packages; the bytes of the file also depend on the versions of libwebp and zlib.

Dims: N emoji.
"""

import argparse
import io
import json
import sys
import tarfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from speedit_plugins.files import replacing, sha256_of
from speedit_plugins.trainer.data.images.emoji import SOURCE_SIZE, halved

# Hashes of the published packages: with other files the dataset could change unnoticed.
IMAGES_SHA256 = {
    "twitter": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "google": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
}
NAMES_SHA256 = "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689"
# WebP's largest side.
LARGEST_SIDE = 16383
# The code point that asks for display as emoji. The two packages do not use it in the same places.
VARIATION_SELECTOR = "-FE0F"
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="emoji-datasource-VENDOR-16.0.0.tgz")
    parser.add_argument("--names", type=Path, required=True, help="emojibase-data-16.0.3.tgz")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file")
    parser.add_argument(
        "--vendor", choices=list(IMAGES_SHA256), default="twitter", help="who drew the images"
    )
    parser.add_argument(
        "--side", type=int, choices=[SOURCE_SIZE, SOURCE_SIZE // 2], default=SOURCE_SIZE, help="in pixels"
    )
    args = parser.parse_args(argv)
    try:
        num_emoji = build(args.images, args.names, args.output, vendor=args.vendor, side=args.side)
    except (ValueError, OSError) as error:
        print(f"build_emoji: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {num_emoji} emoji, {args.output.stat().st_size} bytes")
    return 0


def build(
    image_package: Path,
    name_package: Path,
    output: Path,
    *,
    vendor: str = "twitter",
    side: int = SOURCE_SIZE,
) -> int:
    """Writes the dataset file atomically and returns N.

    Raises:
        ValueError: a package has another SHA-256.
        OSError: a package cannot be read or the file cannot be written.
    """
    check_package(image_package, IMAGES_SHA256[vendor])
    check_package(name_package, NAMES_SHA256)
    with tarfile.open(name_package) as package:
        caption_of_key = read_names(package)
    with tarfile.open(image_package) as package:
        images, captions = read_images(package, caption_of_key, vendor=vendor)
    pixels: dict[str, Any] = {"sheet": sheet(images)} if side == SOURCE_SIZE else {"images": halved(images)}
    # An open file, since numpy would append .npz to a path without it.
    with replacing(output) as partial, partial.open("wb") as file:
        np.savez_compressed(file, captions=np.array(captions), **pixels)
    return len(captions)


def check_package(path: Path, sha256: str) -> None:
    """Checks the SHA-256 of a package.

    Raises:
        ValueError: it is another one.
    """
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(f"{path} must have the SHA-256 {sha256}, got {found}")


def read_names(package: tarfile.TarFile) -> dict[str, str]:
    """Maps each emoji's hexadecimal code points, without variation selectors, to its caption."""
    entries = json.loads(_content(package, "package/en/compact.json"))
    return {_key(entry["hexcode"]): caption_of(entry["label"]) for entry in entries}


def caption_of(name: str) -> str:
    """The name in lower-case ASCII, without accents and with straight quotation marks."""
    plain = unicodedata.normalize("NFKD", name.translate(QUOTES))
    return "".join(sign for sign in plain if not unicodedata.combining(sign)).lower()


def read_images(
    package: tarfile.TarFile, names: dict[str, str], *, vendor: str = "twitter"
) -> tuple[NDArray[np.uint8], list[str]]:
    """Images, uint8 (N, 64, 64, 3), and captions, in Unicode's emoji order, without skin-tone variants."""
    emoji: list[dict[str, Any]] = json.loads(_content(package, "package/emoji.json"))
    emoji.sort(key=lambda entry: entry["sort_order"])
    # Read in the archive's order: going backwards in a compressed archive decompresses it from the start.
    folder = f"package/img/{vendor}/64/"
    pngs = {member.name: _read(package, member) for member in package if member.name.startswith(folder)}
    images = [blended(Image.open(io.BytesIO(pngs[folder + entry["image"]]))) for entry in emoji]
    captions = [names[_key(entry["unified"])] for entry in emoji]
    assert len(set(captions)) == len(captions)
    assert all(caption.isascii() for caption in captions)
    return np.stack(images), captions


def blended(image: Image.Image) -> NDArray[np.uint8]:
    """Blends an image onto white, uint8 (64, 64, 3).

    Each value is rounded up or down, so that `halved` gives the rounded mean of the exact values: the rounded
    mean of rounded ones is another number in two blocks of a hundred.

    Raises:
        ValueError: the image does not have 64 x 64 pixels.
    """
    if image.size != (SOURCE_SIZE, SOURCE_SIZE):
        raise ValueError(f"images must have 64 x 64 pixels, got {image.size}")
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
    opacity = pixels[..., 3:] / 255.0
    over_white = pixels[..., :3] * opacity + 255.0 * (1.0 - opacity)  # (64, 64, 3)
    half = SOURCE_SIZE // 2
    squares = over_white.reshape(half, 2, half, 2, 3)
    wanted = np.rint(squares.mean(axis=(1, 3))).ravel()
    exact = squares.transpose(0, 2, 4, 1, 3).reshape(-1, 4)  # the four values of each mean
    rounded = np.rint(exact)
    while (is_off := np.rint(rounded.mean(axis=1)) != wanted).any():
        rows = np.flatnonzero(is_off)
        step = np.sign(wanted[rows] - rounded[rows].mean(axis=1))
        # The value that its rounding has taken farthest the other way.
        column = ((exact[rows] - rounded[rows]) * step[:, None]).argmax(axis=1)
        rounded[rows, column] += step
    assert (np.abs(rounded - exact) < 1).all()
    values: NDArray[np.float64] = rounded.reshape(half, half, 3, 2, 2).transpose(0, 3, 1, 4, 2)
    return values.reshape(SOURCE_SIZE, SOURCE_SIZE, 3).astype(np.uint8)


def sheet(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images (N, 64, 64, 3), row by row in one lossless WebP image, as bytes (K,); white fills the rest."""
    columns = -(-len(images) * SOURCE_SIZE // LARGEST_SIDE)
    rows = -(-len(images) // columns)
    cells = np.full((rows * columns, *images.shape[1:]), 255, np.uint8)
    cells[: len(images)] = images
    cells = cells.reshape(rows, columns, *images.shape[1:]).transpose(0, 2, 1, 3, 4)
    file = io.BytesIO()
    whole = Image.fromarray(cells.reshape(rows * SOURCE_SIZE, columns * SOURCE_SIZE, 3))
    whole.save(file, "webp", lossless=True, quality=100, method=6)
    return np.frombuffer(file.getvalue(), np.uint8)


def _key(code_points: str) -> str:
    return code_points.upper().replace(VARIATION_SELECTOR, "")


def _content(package: tarfile.TarFile, name: str) -> bytes:
    return _read(package, package.getmember(name))


def _read(package: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = package.extractfile(member)
    assert file is not None, f"{member.name} is not a file"
    return file.read()


if __name__ == "__main__":
    sys.exit(main())
