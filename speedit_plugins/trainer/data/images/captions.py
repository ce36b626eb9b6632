"""Images and captions listed in a file: CSV, JSON lines, or MS-COCO's JSON.

Dims: H x W pixels after the crop, N images.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.buckets import checked_sides
from speedit_plugins.trainer.data.images.folder import ON_CORRUPT, ImageFolder
from speedit_plugins.trainer.data.strings import Strings
from speedit_plugins.trainer.data.tables import read_table

# Key names in use for the path and the caption in JSON lines; a row has exactly one of each.
PATH_KEYS = ("file_name", "path")
TEXT_KEYS = ("text", "caption")
# An error message names at most this many missing files.
NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a captions file: its place in the file, its path as written there, its captions."""

    where: str
    path: str
    texts: tuple[str, ...]


class ImageCaptions(ImageFolder):
    """Images with captions, in the order of a captions file. Pixels are read as in `ImageFolder`.

    The captions file has one of three layouts:

    - .csv with the columns "path" and "text", as in Open-Sora;
    - .jsonl with one JSON object per line, as in Hugging Face's `metadata.jsonl`: "file_name" or "path", and
      "text" or "caption";
    - .json with "images" and "annotations", as in MS-COCO; an image may have several captions.

    Other columns and keys are ignored.

    Args:
        captions_file: ends in .csv, .jsonl or .json.
        image_size: side of the square crop in pixels, >= 1.
        root: folder that image paths are relative to; None uses the folder of the captions file.
        random_flip: mirror left to right with probability 1/2. Captions that mention left or right then
            become wrong for mirrored images.
        on_corrupt: as in `ImageFolder`; the image that replaces a damaged one keeps its own caption.
        buckets: as in `ImageFolder`.

    Raises:
        ValueError: a file or folder is missing; the captions file is empty or malformed, or a row has no path
            or text (the message names the line); image files are missing; buckets are invalid; or, with
            buckets, an image header is damaged.
        OSError: the system fails to read the captions file or, with buckets, an image.
    """

    # There are too many captions to encode them all once and keep the features, as for embedded datasets.
    captions = None

    def __init__(
        self,
        captions_file: str | os.PathLike[str],
        *,
        image_size: int,
        root: str | os.PathLike[str] | None = None,
        random_flip: bool = False,
        on_corrupt: str = "raise",
        buckets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"ImageCaptions needs image_size >= 1, got {image_size}")
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"ImageCaptions needs on_corrupt in {ON_CORRUPT}, got {on_corrupt!r}")
        file = Path(captions_file).expanduser()
        self.root = file.parent if root is None else Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"ImageCaptions needs root to be a folder, got {self.root}")
        self.image_size = image_size
        self.random_flip = random_flip
        self.on_corrupt = on_corrupt
        rows = list(read_captions(file))
        self._texts = _Texts(row.texts for row in rows)
        self._paths = Strings(_existing(rows, file, self.root))
        # There are no classes. ImageFolder.load's label holds the row number here, to find the captions.
        self.classes, self.num_classes = (), 0
        self.labels = torch.arange(len(rows))
        self._sides = [(image_size, image_size)] if buckets is None else checked_sides(buckets)
        self.buckets = None if buckets is None else self._nearest_buckets()
        self._corrupt = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "caption" str.

        `generator` decides the flip, then which caption if there are several.

        Raises:
            ValueError: the file is damaged and on_corrupt is "raise", or it is "skip" and no file (of this
                bucket) is readable.
            OSError: the system fails to read the file.
        """
        sample = self.load_all(index, generator)
        texts = sample["captions"]
        # A single caption uses no random number.
        number = int(torch.randint(len(texts), (), generator=generator)) if len(texts) > 1 else 0
        return {"image": sample["image"], "caption": texts[number]}

    def load_all(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Like `load`, but with all captions of the image: "captions", list of str."""
        sample = super().load(index, generator)
        return {"image": sample["image"], "captions": self._texts.of(sample["label"])}

    @property
    def max_captions(self) -> int:
        """Largest number of captions that one image has."""
        return self._texts.most


def read_captions(file: Path) -> Iterator[Row]:
    """Yields the rows of a captions file, with paths and texts stripped of white space.

    Raises:
        ValueError: the file is missing, has another suffix or no rows, or a row is malformed (the message
            names its line).
        OSError: the system fails to read the file.
    """
    if not file.is_file():
        raise ValueError(f"the captions file must be a file, got {file}")
    if file.suffix.lower() not in READERS:
        raise ValueError(f"a captions file must end in one of {', '.join(READERS)}, got {file}")
    is_empty = True
    try:
        for row in READERS[file.suffix.lower()](file):
            is_empty = False
            yield _checked(row, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} must be UTF-8: {error}") from error
    if is_empty:
        raise ValueError(f"{file} has no captions, wanted at least one")


def _checked(row: Row, file: Path) -> Row:
    """The row with path and texts stripped; raises ValueError if one of them is empty or not Unicode."""
    place = f"{file}, {row.where}"
    path, texts = row.path.strip(), tuple(text.strip() for text in row.texts)
    if not path:
        raise ValueError(f"{place}: wanted the path of an image, got none")
    if not texts or not all(texts):
        raise ValueError(f"{place}: wanted a text for the image {path!r}, got none")
    try:
        "".join((path, *texts)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: wanted valid Unicode text, got half a character: {error}") from error
    return Row(row.where, path, texts)


def _read_csv(file: Path) -> Iterator[Row]:
    for line, values in read_table(file, ("path", "text")):
        yield Row(f"line {line}", values["path"], (values["text"],))


def _read_json_lines(file: Path) -> Iterator[Row]:
    # Split at line feeds only: JSON strings may hold other characters that Python treats as line ends.
    with file.open(encoding="utf-8", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number}"
            content = _json(line, f"{file}, {where}")
            yield Row(
                where, _one_of(PATH_KEYS, content, file, where), (_one_of(TEXT_KEYS, content, file, where),)
            )


def _read_coco(file: Path) -> Iterator[Row]:
    content = _json(file.read_text(encoding="utf-8"), str(file))
    images, annotations = (_list_of(content, name, file) for name in ("images", "annotations"))
    texts: dict[int | str, list[str]] = {}
    for number, image in enumerate(images):
        where = f"images[{number}]"
        key = image.get("id") if isinstance(image, dict) else None
        if not isinstance(key, int | str):
            raise ValueError(f"{file}, {where}: wanted 'id' as int or str, got {key!r}")
        if key in texts:
            raise ValueError(f"{file}, {where}: wanted a unique 'id', got {key!r} again")
        texts[key] = []
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        key = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(key, int | str) or key not in texts:
            raise ValueError(f"{file}, {where}: wanted 'image_id' to be the id of an image, got {key!r}")
        texts[key].append(_one_of(("caption",), annotation, file, where))
    for number, image in enumerate(images):
        where = f"images[{number}]"
        yield Row(where, _one_of(("file_name",), image, file, where), tuple(texts[image["id"]]))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    # Deeply nested JSON exceeds the parser's recursion limit.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: wanted JSON: {error}") from error


def _list_of(content: Any, name: str, file: Path) -> list[Any]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{file} needs a list {name!r}, as in MS-COCO's captions")
    return found


def _one_of(keys: Sequence[str], content: Any, file: Path, where: str) -> str:
    """The text under the one key of `keys` that the object has."""
    wanted = " or ".join(map(repr, keys))
    if not isinstance(content, dict):
        raise ValueError(f"{file}, {where}: wanted an object with {wanted}, got {content!r}")
    present = [key for key in keys if key in content]
    if len(present) != 1:
        raise ValueError(f"{file}, {where}: wanted {wanted}, got {', '.join(content) or 'nothing'}")
    value = content[present[0]]
    if not isinstance(value, str):
        raise ValueError(f"{file}, {where}: wanted {present[0]!r} as str, got {value!r}")
    return value


def _existing(rows: Sequence[Row], file: Path, root: Path) -> list[str]:
    """The full paths of the images.

    Raises:
        ValueError: some files are missing; the message names the first few.
    """
    paths = [root / row.path for row in rows]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        named = [f"{paths[number]} ({rows[number].where})" for number in missing[:NUM_NAMED]]
        rest = ", ..." if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"{file}: {len(missing)} of {len(rows)} images are missing: {', '.join(named)}{rest}"
        )
    return [os.fspath(path) for path in paths]


class _Texts:
    """The captions of N images; each image has one or more."""

    def __init__(self, groups: Iterable[Sequence[str]]) -> None:
        first: list[int] = [0]
        texts: list[str] = []
        for group in groups:
            texts += group
            first.append(len(texts))
        self._texts = Strings(texts)
        self._first = np.array(first, dtype=np.int64)  # index of each image's first caption
        self.most = int(np.diff(self._first).max())

    def of(self, index: int) -> list[str]:
        """The captions of one image."""
        return [self._texts[number] for number in range(self._first[index], self._first[index + 1])]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_coco,
}

DATASETS.register_module(name="ImageCaptions", module=ImageCaptions)
