"""Videos and images listed in a table, with captions or classes.

Dims: C = 3 colours, F frames, H x W pixels after the crop, N rows.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.strings import Strings
from speedit_plugins.trainer.data.tables import read_table
from speedit_plugins.trainer.data.videos.clips import Clips, Cut, Entry

NUMBERS = ("num_frames", "height", "width", "fps")
# What is larger is a slip, and may be more than an int64 holds.
MOST = 2**31 - 1


class VideoTable(Clips):
    """Clips of the videos in a CSV file, as Open-Sora's tables are: see `Clips`.

    Columns: `path`; `text`, the caption; `label`, the class; `num_frames`, `height`, `width`, which are read
    from the file where column or value is missing (the sizes only with buckets). Others have no effect; of
    `fps` the values are checked. A path may lead to a video, to an image, which is a video of one frame, or
    to a folder of numbered images, a frame each.

    Attributes: `classes`, `num_classes`, `channels`, `image_size`, `num_frames`, `buckets`.

    Args:
        table: the CSV file, in UTF-8, with a line of column names.
        image_size: side of the square crop in pixels, >= 1.
        num_frames: F, >= 1.
        frame_interval: a clip takes each so many-th frame, >= 1.
        random_start: a clip begins anywhere it fits; False takes the first frames.
        text: samples have captions, from the column `text`.
        class_cond: samples have labels, from the column `label`: numbers in their order, names sorted.
            Without both the label is 0.
        root: where the paths begin; None takes the table's folder.
        on_corrupt: "raise" names a video that is missing, too short or damaged; "skip" warns of it and takes
            the next usable one, with that one's caption or label.
        random_flip: mirror left to right with probability 1/2.
        buckets: [num_frames, height, width] of each; None crops to the square.

    Raises:
        ValueError: no such table, a column that is missing, a value that is no number or empty, no rows; see
            `Clips` for the rest.
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
    ) -> None:
        cut = Cut(num_frames, image_size, frame_interval, random_start, random_flip, buckets)
        path = Path(table).expanduser()
        folder = path.parent if root is None else Path(root).expanduser()
        used = ("path", *(("text",) if text else ()), *(("label",) if class_cond else ()))
        rows = read_rows(path, used)
        entries = [
            Entry(
                os.fspath(folder / row["path"]), row["num_frames"], row["height"], row["width"], row["line"]
            )
            for row in rows
        ]
        super().__init__(entries, cut, on_corrupt=on_corrupt, table=path)
        self._captions = Strings([row["text"] for row in rows]) if text else None
        self.classes = _classes([row["label"] for row in rows]) if class_cond else ()
        self.num_classes = len(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[row["label"]] if class_cond else 0 for row in rows])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "video" float32 (3, F, H, W) in [-1, 1], and "caption" str, "label" int, or both.

        `generator` decides the start and the flip.

        Raises:
            ValueError: a damaged video, see `Clips.clip`.
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
    """The rows of a table: `line`, the wanted columns as text, and `NUMBERS` as such or None.

    Args:
        path: a CSV file, as `read_table` reads it.
        columns: those that the table must have, with a value in each row.

    Raises:
        ValueError: no such file, a missing column, an empty or unusable value, no rows; names file, line
            and column.
    """
    if not path.is_file():
        raise ValueError(f"a table of videos needs a CSV file, got {path}, which is none")
    rows = [
        {"line": line, **_parsed(values, columns, f"{path}, line {line}")}
        for line, values in read_table(path, columns, optional=NUMBERS)
    ]
    if not rows:
        raise ValueError(f"the table {path} has no rows, wanted one per video")
    return rows


def _parsed(row: Mapping[str, str], columns: Sequence[str], place: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in columns:
        values[name] = row[name]
        if not values[name]:
            raise ValueError(f"{place}, column {name}: got nothing, wanted a {name}")
    # A NUL ends a path to the system.
    if "\0" in values["path"]:
        raise ValueError(f"{place}, column path: got {values['path']!r}, wanted a path")
    for name in NUMBERS:
        # A column with gaps is written by pandas as 51.0 and nan.
        text = row.get(name, "")
        values[name] = None if text.lower() in ("", "nan") else _positive(text, name, place)
    return values


def _positive(text: str, name: str, place: str) -> int | float:
    """The number; of all columns but `fps` it is whole and at most `MOST`."""
    wanted = "a number > 0" if name == "fps" else f"a whole number > 0, at most {MOST}"
    try:
        number = float(text)
    except ValueError as error:
        raise ValueError(f"{place}, column {name}: got {text!r}, wanted {wanted}") from error
    if not 0 < number < float("inf") or (name != "fps" and (number != int(number) or number > MOST)):
        raise ValueError(f"{place}, column {name}: got {text!r}, wanted {wanted}")
    return number if name == "fps" else int(number)


def _classes(labels: Sequence[str]) -> tuple[str, ...]:
    """The different labels: numbers first and by their size, then names sorted."""
    return tuple(
        sorted(set(labels), key=lambda label: (int(label) if label.isdecimal() else float("inf"), label))
    )


DATASETS.register_module(name="VideoTable", module=VideoTable)
