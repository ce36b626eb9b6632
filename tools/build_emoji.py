"""Makes the embedded emoji from two npm packages: pictures from one, names from the other.

    npm pack emoji-datasource-twitter@16.0.0
    npm pack emojibase-data@16.0.3
    python tools/build_emoji.py --pictures emoji-datasource-twitter-16.0.0.tgz \\
        --names emojibase-data-16.0.3.tgz --output speedit_plugins/trainer/data/assets/emoji_32.npz

The same packages give the same arrays; the file's bytes also depend on the version of zlib.

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

# Of the packages, as the registry gives them out: another one would change the dataset unseen.
PICTURES_SHA256 = "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
NAMES_SHA256 = "cab288279075778f15b37f3ca60dfb17759af6fe29758e07338e248879991689"
SOURCE_SIZE = 64
# Emoji's sign for "as a picture"; the packages do not set it in the same places.
VARIATION_SELECTOR = "-FE0F"
QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"'})


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, required=True, help="emoji-datasource-twitter-16.0.0.tgz")
    parser.add_argument("--names", type=Path, required=True, help="emojibase-data-16.0.3.tgz")
    parser.add_argument("--output", type=Path, required=True, help="the .npz file")
    args = parser.parse_args(argv)
    try:
        num_emoji = build(args.pictures, args.names, args.output)
    except (ValueError, OSError) as error:
        print(f"build_emoji: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.output}: {num_emoji} emoji, {args.output.stat().st_size} bytes")
    return 0


def build(pictures: Path, names: Path, output: Path) -> int:
    """Writes the file, whole or not at all; N.

    Raises:
        ValueError: one of the packages is another file.
        OSError: one cannot be read, or the file not written.
    """
    check_package(pictures, PICTURES_SHA256)
    check_package(names, NAMES_SHA256)
    with tarfile.open(names) as package:
        caption_of_key = read_names(package)
    with tarfile.open(pictures) as package:
        images, captions = read_pictures(package, caption_of_key)
    # A file, since a path without .npz at its end would get one.
    with replacing(output) as partial, partial.open("wb") as file:
        np.savez_compressed(file, images=images, captions=np.array(captions))
    return len(captions)


def check_package(path: Path, sha256: str) -> None:
    """Returns where the file is the package.

    Raises:
        ValueError: it is another file.
    """
    found = sha256_of(path)
    if found != sha256:
        raise ValueError(f"{path} needs the SHA-256 {sha256}, got {found}")


def read_names(package: tarfile.TarFile) -> dict[str, str]:
    """The caption of each emoji by its code points in hexadecimal, without variation selectors."""
    entries = json.loads(_content(package, "package/en/compact.json"))
    return {_key(entry["hexcode"]): caption_of(entry["label"]) for entry in entries}


def caption_of(name: str) -> str:
    """A name in lower-case ASCII: accents left out, quotation marks straight."""
    plain = unicodedata.normalize("NFKD", name.translate(QUOTES))
    return "".join(sign for sign in plain if not unicodedata.combining(sign)).lower()


def read_pictures(package: tarfile.TarFile, names: dict[str, str]) -> tuple[NDArray[np.uint8], list[str]]:
    """Pictures (N, 32, 32, 3) and captions in the Unicode order of emoji, without variants of skin tone."""
    emoji: list[dict[str, Any]] = json.loads(_content(package, "package/emoji.json"))
    emoji.sort(key=lambda entry: entry["sort_order"])
    # A compressed archive is read in its own order: in another one, each step back would unpack it again.
    pngs = {member.name: _read(package, member) for member in package if "/img/twitter/64/" in member.name}
    pictures = [halved(Image.open(io.BytesIO(pngs[f"package/img/twitter/64/{e['image']}"]))) for e in emoji]
    captions = [names[_key(entry["unified"])] for entry in emoji]
    assert len(set(captions)) == len(captions)
    assert all(caption.isascii() for caption in captions)
    return np.stack(pictures), captions


def halved(picture: Image.Image) -> NDArray[np.uint8]:
    """A picture laid over white, each two by two pixels averaged: uint8 (32, 32, 3).

    Raises:
        ValueError: it is not of 64 x 64 pixels.
    """
    if picture.size != (SOURCE_SIZE, SOURCE_SIZE):
        raise ValueError(f"pictures need 64 x 64 pixels, got {picture.size}")
    pixels = np.asarray(picture.convert("RGBA"), dtype=np.float64)
    opacity = pixels[..., 3:] / 255.0
    over_white = pixels[..., :3] * opacity + 255.0 * (1.0 - opacity)  # (64, 64, 3)
    half = SOURCE_SIZE // 2
    averaged: NDArray[np.float64] = over_white.reshape(half, 2, half, 2, 3).mean(axis=(1, 3))
    return np.rint(averaged).astype(np.uint8)


def _key(code_points: str) -> str:
    return code_points.upper().replace(VARIATION_SELECTOR, "")


def _content(package: tarfile.TarFile, name: str) -> bytes:
    return _read(package, package.getmember(name))


def _read(package: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = package.extractfile(member)
    assert file is not None, f"{member.name} is no file"
    return file.read()


if __name__ == "__main__":
    sys.exit(main())
