"""Videos and images listed in a CSV table, with captions or classes.

Dims: C = 3 colours, F frames, H x W pixels after the crop, N rows.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.fit import Fit
from speedit_plugins.trainer.data.strings import Strings
from speedit_plugins.trainer.data.tables import read_table
from speedit_plugins.trainer.data.videos.clips import Clips, Cut, Entry

NUMBERS = ("num_frames", "height", "width", "fps")
# Larger numbers in a table are mistakes and might not fit in int64.
MOST = 2**31 - 1


class VideoTable(Clips):
    """Clips of the videos listed in a CSV file, in Open-Sora's layout; see `Clips`.

    Columns:

    - `path`: a video file, an image (a video of one frame), or a folder of numbered images, one per frame;
    - `text`: the caption;
    - `label`: the class;
    - `num_frames`, `height`, `width`: read from the video if the column or a value is missing. Height and
      width are only needed with buckets;
    - `fps`: its values are checked but not used. Other columns are ignored.

    Attributes: `classes`, `num_classes`, `num_captions`, `channels`, `image_size`, `num_frames`, `buckets`,
    `left_out` (number of videos that cannot be used), `num_corrupt`.

    Args:
        table: the CSV file in UTF-8; its first line has the column names.
        image_size: side of the square crop in pixels, >= 1.
        num_frames: F, >= 1.
        frame_interval: a clip takes every frame_interval-th frame, >= 1.
        random_start: a clip starts at a random frame; False starts at the first one.
        text: samples have a caption, from the column `text`.
        class_cond: samples have a label, from the column `label`. Labels that are numbers are numbered first,
            by value, then names in sorted order. If `text` is False too, every label is 0.
        root: folder that relative paths start from; None uses the folder of the table. Absolute paths and
            those that begin with `~`, the home folder, do not depend on it.
        on_corrupt: what to do with a video that is missing, too short or damaged. "raise" raises and names
            it. "skip" warns and uses the next usable video with its caption or label instead.
        random_flip: mirror left to right with probability 1/2.
        buckets: [num_frames, height, width] of each bucket; None makes every video a square.
        fit: as in `ImageFolder`. A random crop is the same for all frames of a clip.
        pad_color: as in `ImageFolder`.

    Raises:
        ValueError: the table is missing or has no rows, a column is missing, a value is empty or not a
            number; see `Clips` for more.
        OSError: the system fails to read a file.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        table: str | os.PathLike[str],
        *,
        image_size: int,
        num_frames: int,
        frame_interval: int = 1,
        random_start: bool = True,
        text: bool = True,
        class_cond: bool = False,
        root: str | os.PathLike[str] | None = None,
        on_corrupt: str = "raise",
        random_flip: bool = False,
        buckets: Sequence[Sequence[int]] | None = None,
        fit: str = "crop",
        pad_color: str | Sequence[int] | None = None,
    ) -> None:
        fitted = Fit(fit, pad_color)
        cut = Cut(num_frames, image_size, frame_interval, random_start, random_flip, buckets, fitted)
        path = Path(table).expanduser()
        folder = path.parent if root is None else Path(root).expanduser()
        used = ("path", *(("text",) if text else ()), *(("label",) if class_cond else ()))
        rows = read_rows(path, used)
        entries = [
            Entry(
                os.path.join(folder, os.path.expanduser(row["path"])),
                row["num_frames"],
                row["height"],
                row["width"],
                row["line"],
            )
            for row in rows
        ]
        super().__init__(entries, cut, on_corrupt=on_corrupt, base=folder, table=path)
        self._captions = Strings([row["text"] for row in rows]) if text else None
        self.classes = _classes([row["label"] for row in rows]) if class_cond else ()
        self.num_classes = len(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[row["label"]] if class_cond else 0 for row in rows])

    @property
    def num_captions(self) -> int:
        """Number of videos with captions."""
        return 0 if self._captions is None else len(self._captions)

    def identity(self) -> dict[str, str]:
        """Digests of names, classes, labels, captions, sizes and times, see `identify`."""
        captions = {} if self._captions is None else {"captions": self._captions}
        own = identify(classes=self.classes, labels=self.labels.numpy(), **captions)
        return {**super().identity(), **own}

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "video" float32 (3, F, H, W) in [-1, 1], and "caption" str, "label" int, or both.

        `generator` decides the first frame and the flip.

        Raises:
            ValueError: the video is damaged; see `Clips.clip`.
            OSError: the system fails to read the file.
        """
        video, index = self.clip(index, generator)
        sample: dict[str, Any] = {"video": video}
        if self._captions is not None:
            sample["caption"] = self._captions[index]
        if self.classes or self._captions is None:
            sample["label"] = int(self.labels[index])
        return sample


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a table as dicts: `line`, the wanted columns as text, and NUMBERS as numbers or None.

    Args:
        path: a CSV file for `read_table`.
        columns: required columns; every row must have a value in them.

    Raises:
        ValueError: the file is missing or has no rows, a column is missing, or a value is empty or invalid;
            the message names file, line and column.
    """
    if not path.is_file():
        raise ValueError(f"a table of videos must be a CSV file, got {path}")
    rows = [
        {"line": line, **_parsed(values, columns, f"{path}, line {line}")}
        for line, values in read_table(path, columns, optional=NUMBERS)
    ]
    if not rows:
        raise ValueError(f"the table {path} has no rows, wanted one row per video")
    return rows


def _parsed(row: Mapping[str, str], columns: Sequence[str], place: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in columns:
        values[name] = row[name]
        if not values[name]:
            raise ValueError(f"{place}, column {name}: got nothing, wanted a {name}")
    # The operating system does not allow NUL in a path.
    if "\0" in values["path"]:
        raise ValueError(f"{place}, column path: got {values['path']!r}, wanted a path")
    for name in NUMBERS:
        # pandas writes integer columns with gaps as 51.0 and nan.
        text = row.get(name, "")
        values[name] = None if text.lower() in ("", "nan") else _positive(text, name, place)
    return values


def _positive(text: str, name: str, place: str) -> int | float:
    """Parses a number > 0. All columns except `fps` need whole numbers up to `MOST`."""
    wanted = "a number > 0" if name == "fps" else f"a whole number > 0, at most {MOST}"
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{place}, column {name}: got {text!r}, wanted {wanted}") from error
    if not 0 < number < float("inf") or (name != "fps" and (number != int(number) or number > MOST)):
        raise ValueError(f"{place}, column {name}: got {text!r}, wanted {wanted}")
    return number if name == "fps" else int(number)


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The distinct labels: numbers first, in numeric order, then names in sorted order."""
    return tuple(
        sorted(set(labels), key=lambda label: (int(label) if label.isdecimal() else float("inf"), label))
    )


DATASETS.register_module(name="VideoTable", module=VideoTable)
