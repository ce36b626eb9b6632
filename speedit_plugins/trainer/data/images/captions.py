"""Images with captions that a file lists: a CSV, JSON lines, or MS-COCO's JSON.

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

# Names of the same thing in the field's files of JSON lines; a row has one of each.
PATH_KEYS = ("file_name", "path")
TEXT_KEYS = ("text", "caption")
# An error names so many of the missing files.
NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class Row:
    """An image of a captions file: where in the file it stands, its path there, its captions."""

    where: str
    path: str
    texts: tuple[str, ...]


class ImageCaptions(ImageFolder):
    """The images of a captions file in its order, each with its caption; read as by `ImageFolder`.

    Source of the layouts: columns "path" and "text" of a CSV as in Open-Sora; a JSON object a line as in
    Hugging Face's `metadata.jsonl`, with "file_name" or "path" and "text" or "caption"; "images" and
    "annotations" of MS-COCO's captions, in which an image has several. Paths are relative to `root`. What
    else the file says is not read.

    Args:
        captions_file: ends in .csv, .jsonl or .json (MS-COCO).
        image_size: side of the square crop in pixels, >= 1.
        root: the folder of the images; None for that of the captions file.
        random_flip: mirror left to right with probability 1/2; captions that tell left from right then lie.
        on_corrupt: as in `ImageFolder`; an image that takes the place of a damaged one brings its caption.
        buckets: as in `ImageFolder`.

    Raises:
        ValueError: no such file or folder; a captions file that is none or empty, a row without path or text
            (names the line); image files that are not there; unusable buckets, with them a damaged header.
        OSError: the system fails to read the captions file, or with buckets an image.
    """

    # Too many to encode once and keep, unlike those of the embedded sets.
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
            raise ValueError(f"ImageCaptions needs a folder as root, got {self.root}, which is none")
        self.image_size = image_size
        self.random_flip = random_flip
        self.on_corrupt = on_corrupt
        rows = list(read_captions(file))
        self._texts = _Texts(row.texts for row in rows)
        self._paths = Strings(_existing(rows, file, self.root))
        # No classes: the label that ImageFolder gives to a sample is here the number of the row it is of.
        self.classes, self.num_classes = (), 0
        self.labels = torch.arange(len(rows))
        self._sides = [(image_size, image_size)] if buckets is None else checked_sides(buckets)
        self.buckets = None if buckets is None else self._nearest_buckets()
        self._corrupt = torch.zeros(len(rows), dtype=torch.bool).share_memory_()

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "caption" str.

        `generator` decides the flip, then which of several captions.

        Raises:
            ValueError: a damaged file with on_corrupt="raise", or with "skip" no readable one at all (of its
                bucket).
            OSError: the system fails to read the file.
        """
        sample = self.load_all(index, generator)
        texts = sample["captions"]
        # A single one draws nothing.
        number = int(torch.randint(len(texts), (), generator=generator)) if len(texts) > 1 else 0
        return {"image": sample["image"], "caption": texts[number]}

    def load_all(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """As `load`, but "captions", list of str: all that the image has; `generator` decides the flip."""
        sample = super().load(index, generator)
        return {"image": sample["image"], "captions": self._texts.of(sample["label"])}

    @property
    def max_captions(self) -> int:
        """Of the image that has the most."""
        return self._texts.most


def read_captions(file: Path) -> Iterator[Row]:
    """The rows of a captions file, at least one, with white space around paths and texts taken off.

    Raises:
        ValueError: no such file, another suffix, no rows, or what is wrong in which line.
        OSError: the system fails to read the file.
    """
    if not file.is_file():
        raise ValueError(f"a captions file is wanted, got {file}, which is none")
    if file.suffix.lower() not in READERS:
        raise ValueError(f"a captions file needs a suffix of {', '.join(READERS)}, got {file}")
    is_empty = True
    try:
        for row in READERS[file.suffix.lower()](file):
            is_empty = False
            yield _checked(row, file)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} needs to be UTF-8: {error}") from error
    if is_empty:
        raise ValueError(f"{file} has no captions, wanted one or more")


def _checked(row: Row, file: Path) -> Row:
    """The row without white space at the ends, which then has to have a path and texts."""
    place = f"{file}, {row.where}"
    path, texts = row.path.strip(), tuple(text.strip() for text in row.texts)
    if not path:
        raise ValueError(f"{place}: wanted the path of an image, got none")
    if not texts or not all(texts):
        raise ValueError(f"{place}: wanted a text for the image {path!r}, got none")
    try:
        "".join((path, *texts)).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}: wanted text, got a part of a character: {error}") from error
    return Row(row.where, path, texts)


def _read_csv(file: Path) -> Iterator[Row]:
    for line, values in read_table(file, ("path", "text")):
        yield Row(f"line {line}", values["path"], (values["text"],))


def _read_json_lines(file: Path) -> Iterator[Row]:
    # By line feeds alone: JSON may hold what Python takes for other ends of lines.
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
            raise ValueError(f"{file}, {where}: wanted 'id' to be int or str, got {key!r}")
        if key in texts:
            raise ValueError(f"{file}, {where}: wanted an 'id' of its own, got {key!r} again")
        texts[key] = []
    for number, annotation in enumerate(annotations):
        where = f"annotations[{number}]"
        key = annotation.get("image_id") if isinstance(annotation, dict) else None
        if not isinstance(key, int | str) or key not in texts:
            raise ValueError(f"{file}, {where}: wanted 'image_id' to be of an image, got {key!r}")
        texts[key].append(_one_of(("caption",), annotation, file, where))
    for number, image in enumerate(images):
        where = f"images[{number}]"
        yield Row(where, _one_of(("file_name",), image, file, where), tuple(texts[image["id"]]))


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    # Deep nesting ends the parser's recursion.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: wanted JSON: {error}") from error


def _list_of(content: Any, name: str, file: Path) -> list[Any]:
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{file} needs the list {name!r}, as MS-COCO's captions have it")
    return found


def _one_of(keys: Sequence[str], content: Any, file: Path, where: str) -> str:
    """The text under the one of the keys that the object has."""
    wanted = " or ".join(map(repr, keys))
    if not isinstance(content, dict):
        raise ValueError(f"{file}, {where}: wanted an object with {wanted}, got {content!r}")
    present = [key for key in keys if key in content]
    if len(present) != 1:
        raise ValueError(f"{file}, {where}: wanted {wanted}, got {', '.join(content) or 'nothing'}")
    value = content[present[0]]
    if not isinstance(value, str):
        raise ValueError(f"{file}, {where}: wanted {present[0]!r} to be str, got {value!r}")
    return value


def _existing(rows: Sequence[Row], file: Path, root: Path) -> list[str]:
    """The images' paths.

    Raises:
        ValueError: some are not there; the first few are named.
    """
    paths = [root / row.path for row in rows]
    missing = [number for number, path in enumerate(paths) if not path.is_file()]
    if missing:
        named = [f"{paths[number]} ({rows[number].where})" for number in missing[:NUM_NAMED]]
        rest = ", ..." if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"{file}: {len(missing)} of {len(rows)} images are not there: {', '.join(named)}{rest}"
        )
    return [os.fspath(path) for path in paths]


class _Texts:
    """The captions of N images, of which each has one or more."""

    def __init__(self, groups: Iterable[Sequence[str]]) -> None:
        first: list[int] = [0]
        texts: list[str] = []
        for group in groups:
            texts += group
            first.append(len(texts))
        self._texts = Strings(texts)
        self._first = np.array(first, dtype=np.int64)  # the first caption of each image
        self.most = int(np.diff(self._first).max())

    def of(self, index: int) -> list[str]:
        """The captions of the image."""
        return [self._texts[number] for number in range(self._first[index], self._first[index + 1])]


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": _read_csv,
    ".jsonl": _read_json_lines,
    ".json": _read_coco,
}

DATASETS.register_module(name="ImageCaptions", module=ImageCaptions)
