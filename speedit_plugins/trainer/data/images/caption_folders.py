"""Finds the captions of a folder of images: in metadata files, or in a text file beside each image."""

import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from speedit_plugins.trainer.data.images.caption_files import Row, read_captions
from speedit_plugins.trainer.data.images.pixels import readable_suffixes
from speedit_plugins.trainer.data.listing import facts_of, list_files, stamps_of
from speedit_plugins.trainer.data.strings import Strings

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION_SUFFIX = ".txt"
CAPTION_LINES = ("join", "choose")
MISSING_CAPTIONS = ("raise", "empty")
# Folder names of the parts of a data set that are not for training.
_HELD_OUT = ("dev", "eval", "test", "val", "valid", "validation")
# An error message names at most this many files.
NUM_NAMED = 3


@dataclass(frozen=True)
class CaptionOptions:
    """How a folder's captions are found; the arguments of `ImageCaptions` of the same names.

    Raises:
        ValueError: a value is invalid, or an option has no effect beside another one.
    """

    text_column: str | None = None
    caption_suffix: str | None = None
    caption_lines: str = "join"
    missing_captions: str = "raise"
    follow_links: bool = False

    def __post_init__(self) -> None:
        for name, known in (("caption_lines", CAPTION_LINES), ("missing_captions", MISSING_CAPTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"ImageCaptions needs {name} in {known}, got {getattr(self, name)!r}")
        suffix = self.caption_suffix
        if suffix is not None and (not suffix.startswith(".") or os.sep in suffix or len(suffix) < 2):
            raise ValueError(f"ImageCaptions needs caption_suffix such as '.txt', got {suffix!r}")
        if suffix is not None and self.text_column is not None:
            raise ValueError(f"text_column has no effect with caption_suffix: {suffix}")

    def check_file(self, file: Path) -> None:
        """Raises ValueError for an option that has no effect with a captions file."""
        for name, default in (("caption_suffix", None), ("follow_links", False)):
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with the captions_file {file}")
        self.check_metadata(str(file))

    def check_metadata(self, source: str) -> None:
        """Raises ValueError for an option that has an effect only on text files beside images."""
        for name, default in (("caption_lines", "join"), ("missing_captions", "raise")):
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no effect on captions from {source}; wanted text files")


@dataclass(frozen=True)
class Captioned:
    """Images and their captions. Paths are relative to `base`; `left_out` counts files that are not used."""

    base: Path
    rows: Sequence[Row]
    left_out: Mapping[str, int] = field(default_factory=dict)


def read_folder(root: Path, options: CaptionOptions) -> Captioned:
    """The images at or below `root` and their captions, see `ImageCaptions`.

    Raises:
        ValueError: the folder has no images or no captions, images lack captions, it has several splits or
            metadata files, or one of them is malformed.
        OSError: the system fails to read a file.
    """
    images = readable_suffixes()
    suffix = (options.caption_suffix or CAPTION_SUFFIX).lower()
    # Names of metadata files have no other ending in common with images.
    listing = list_files(root, suffixes=(*images, suffix, *METADATA), follow_links=options.follow_links)
    everything = list(listing.names)
    names = [name for name in everything if name.lower().endswith(images)]
    if not names:
        raise ValueError(f"ImageCaptions found no images below {root} (suffixes: {', '.join(images)})")
    _check_splits(listing.root, listing.folders)
    metadata = [name for name in everything if name.lower().endswith(METADATA)]
    metadata = [name for name in metadata if posixpath.basename(name).lower() in METADATA]
    if options.caption_suffix is None and metadata:
        options.check_metadata(f"{listing.root / metadata[0]}")
        rows = _metadata_rows(listing.root, metadata, options.text_column)
        unused = {"not in the metadata": len(set(names) - {row.path for row in rows})}
    else:
        if options.text_column is not None:
            raise ValueError(f"text_column needs one of {', '.join(METADATA)} in {root}, got none")
        texts = {_stem(name): name for name in everything if name.lower().endswith(suffix)}
        # Two images of one name, photo.png and photo.jpg, share their text.
        stems = [_stem(name) for name in names]
        files = [texts.get(stem) for stem in stems]
        unused = {f"{suffix} without an image": len(texts.keys() - set(stems))}
        rows = _beside(listing.root, names, files, suffix, options)
    return Captioned(listing.root, rows, {**listing.left_out, **{why: n for why, n in unused.items() if n}})


def _check_splits(root: Path, folders: Strings) -> None:
    splits = [name for name in folders if name.lower() in ("train", *_HELD_OUT)]
    if len(splits) > 1 and "train" in (name.lower() for name in splits):
        train = next(name for name in splits if name.lower() == "train")
        raise ValueError(
            f"{root} has the splits {', '.join(splits)}: wanted one of them as root, such as {root / train}"
        )


def _metadata_rows(root: Path, files: Sequence[str], text_column: str | None) -> list[Row]:
    rows: list[Row] = []
    folders = [posixpath.dirname(name) for name in files]
    for folder, name in zip(folders, files, strict=True):
        if folders.count(folder) > 1:
            both = ", ".join(each for each in files if posixpath.dirname(each) == folder)
            raise ValueError(f"{root} has {both}: wanted one of them; captions_file chooses")
        for row in read_captions(root / name, text_column):
            # As a path in the listing, so that the two can be compared.
            path = posixpath.normpath(posixpath.join(folder, row.path))
            rows.append(Row(f"{name}, {row.where}" if folder else row.where, path, row.texts))
    return rows


def _beside(
    root: Path, names: Sequence[str], files: Sequence[str | None], suffix: str, options: CaptionOptions
) -> list[Row]:
    """The rows of images that have a text file each; None where there is none."""
    listed = Strings([file for file in files if file is not None])
    if not len(listed) and options.missing_captions == "raise":
        raise ValueError(
            f"{root} has {len(names)} images and no captions: wanted {', '.join(METADATA[:-1])} or"
            f" {METADATA[-1]}, or a {suffix} file beside each image, such as {_stem(names[0])}{suffix}"
        )
    stamps = stamps_of(root, listed)
    contents = iter(
        facts_of(root, listed, stamps, what="captions", read=lambda row: _text(root / listed[row]))
    )
    rows, missing = [], []
    for name, file in zip(names, files, strict=True):
        lines = _lines("" if file is None else next(contents), options.caption_lines)
        if not lines:
            missing.append(f"{name} ({_stem(name)}{suffix} is {'missing' if file is None else 'empty'})")
        rows.append(Row(name, name, lines or ("",)))
    if missing and options.missing_captions == "raise":
        more = ", ..." if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"{root}: {len(missing)} of {len(names)} images have no caption: {', '.join(missing[:NUM_NAMED])}"
            f"{more}; missing_captions: empty trains them with the empty caption"
        )
    return rows


def _lines(text: str, caption_lines: str) -> tuple[str, ...]:
    """The captions in a text file; () in an empty one."""
    if caption_lines == "join":
        joined = " ".join(text.split())
        return (joined,) if joined else ()
    return tuple(line for line in (" ".join(line.split()) for line in text.splitlines()) if line)


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
