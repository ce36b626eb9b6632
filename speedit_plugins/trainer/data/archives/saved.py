"""Images in a folder that Hugging Face's `datasets` saved to disk.

Dims: N samples.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.archives.columns import (
    DEFAULTS,
    check_columns,
    image_of,
    label_of,
    texts_of,
)
from speedit_plugins.trainer.data.archives.images import (
    NUM_NAMED,
    Record,
    StoredImages,
    own_or_default,
    size_or_zero,
)
from speedit_plugins.trainer.data.archives.labels import numbered
from speedit_plugins.trainer.data.archives.sources import check_local
from speedit_plugins.trainer.data.identity import identify


class SavedDataset(StoredImages):
    """Images of a dataset that `save_to_disk` wrote, a `Dataset` or a `DatasetDict`.

    A row is a sample. Images, captions and labels are stored as in `ParquetImages`. The files are mapped into
    memory, so rows are read when they are used, and processes share them.

    Args:
        root: the folder.
        image_size: side of the square crop in pixels, >= 1.
        class_cond: samples have a label; the names of a `ClassLabel` are the classes.
        text: samples have a caption. Without both, every label is 0.
        split: one of a `DatasetDict`'s datasets; null takes the only one.
        image_column: name of the images' column; null is `image`.
        caption_column: name of the captions' column; null is `text`.
        label_column: name of the labels' column; null is `label`.
        random_flip: mirror left to right with probability 1/2.
        on_corrupt: "raise" raises at a row without a label, and at a damaged image or caption; the message
            names the row. "skip" leaves out and counts the first; in place of a damaged sample it uses the
            next readable one.
        buckets: as in `ImageFolder`. Every start reads all images for it.
        fit: as in `ImageFolder`.
        pad_color: as in `ImageFolder`.
        bit_depth: as in `ImageFolder`.

    Raises:
        ValueError: no such folder, a remote address, another split, a missing column, an option that has no
            effect; with "raise" also what is named there.
        ImportError: datasets is missing.
        OSError: the system fails to read a file.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int,
        class_cond: bool = False,
        text: bool = False,
        split: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        random_flip: bool = False,
        on_corrupt: str = "raise",
        buckets: Sequence[Sequence[int]] | None = None,
        fit: str = "crop",
        pad_color: str | Sequence[int] | None = None,
        bit_depth: int | None = None,
    ) -> None:
        super().__init__(
            image_size=image_size,
            random_flip=random_flip,
            on_corrupt=on_corrupt,
            buckets=buckets,
            fit=fit,
            pad_color=pad_color,
            bit_depth=bit_depth,
        )
        self.has_text = text
        self._columns = own_or_default(
            {"image_column": image_column, "caption_column": caption_column, "label_column": label_column},
            DEFAULTS,
            {"caption_column": text, "label_column": class_cond},
        )
        if not isinstance(root, str | os.PathLike):
            raise ValueError(f"SavedDataset needs root to be a path, got {root!r}")
        check_local(os.fspath(root), "SavedDataset")
        self._root = Path(root).expanduser()
        table, self._folder = _loaded(self._root, split)
        check_columns(self._columns, table.column_names, self._root)
        columns = list(dict.fromkeys(self._columns.values()))
        self._table = _undecoded(
            table.select_columns(columns).with_format(None), self._columns["image_column"]
        )
        classes, labels, rows = self._labelled() if class_cond else ((), None, np.arange(len(table)))
        self._rows = rows
        self._number(torch.zeros(len(rows), dtype=torch.int64) if labels is None else labels, classes)

    def name(self, index: int) -> str:
        """Folder and row of a sample."""
        return self._place(int(self._rows[index]))

    def identity(self) -> dict[str, str]:
        """Digests of the rows' numbers, classes, labels, and sizes and times of all files together."""
        facts = [path.stat() for path in sorted(self._folder.glob("*.arrow"))]
        totals = {
            "sizes": sum(fact.st_size for fact in facts),
            "times": max((fact.st_mtime_ns for fact in facts), default=0),
        }
        return identify(
            names=self._rows,
            classes=self.classes,
            labels=self.labels.numpy(),
            **{aspect: np.full(len(self), total) for aspect, total in totals.items()},
        )

    def record(self, index: int) -> Record:
        """The image's bytes and the captions of a row."""
        row = int(self._rows[index])
        place, values = self._place(row), self._table[row]
        image = image_of(values[self._columns["image_column"]], self._root, place)
        if not self.has_text:
            return Record(image, ())
        return Record(image, texts_of(values[self._columns["caption_column"]], place))

    @property
    def max_captions(self) -> int:
        """Largest number of captions that one image has, 0 without text; reads all captions."""
        column = self._columns.get("caption_column")
        if column is None:
            return 0
        values = _column(self._table, column)
        return max((len(value) if isinstance(value, list) else 1 for value in values), default=1)

    def measured(self) -> np.ndarray:
        """Height and width of each upright image, int64 (N, 2); 0 for a damaged one."""
        sizes = [size_or_zero(partial(self._image, row)) for row in self._rows.tolist()]
        return np.array(sizes, dtype=np.int64).reshape(-1, 2)

    def _labelled(self) -> tuple[tuple[str, ...], torch.Tensor, np.ndarray]:
        """Classes, labels and row numbers of the rows that have a label."""
        column = self._columns["label_column"]
        names = getattr(self._table.features[column], "names", None)
        values = [label_of(value, names) for value in _column(self._table, column)]
        has = np.array([bool(value) for value in values], dtype=bool)
        lacking = np.flatnonzero(~has)
        places = [self._place(row) for row in lacking[:NUM_NAMED].tolist()]
        self._leave_out("samples without a usable label", places, len(lacking))
        classes, labels = numbered([value for value in values if value], names)
        return classes, labels, np.flatnonzero(has)

    def _image(self, row: int) -> Any:
        column = self._columns["image_column"]
        return image_of(self._table[row][column], self._root, self._place(row))

    def _place(self, row: int) -> str:
        return f"{self._root}, row {row}"


def _loaded(root: Path, split: str | None) -> tuple[Any, Path]:
    """The dataset in a folder, and the folder with its files.

    Raises:
        ValueError: the folder has none, or not this split, or several and none is named.
    """
    datasets = _datasets()
    if not root.is_dir():
        raise ValueError(f"SavedDataset needs root to be a folder that save_to_disk wrote, got {root}")
    try:
        found = datasets.load_from_disk(str(root))
    except (ValueError, OSError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"SavedDataset needs a folder that save_to_disk wrote, got {root}: {reason}"
        ) from error
    if not isinstance(found, datasets.DatasetDict):
        if split is not None and str(found.split) != split:
            raise ValueError(f"{root} has one dataset without splits, got split {split!r}; wanted null")
        return found, root
    known = ", ".join(found)
    if split is None and len(found) > 1:
        raise ValueError(f"{root} has several splits, wanted split to be one of {known}")
    if split is not None and split not in found:
        raise ValueError(f"{root} has no split {split!r}, wanted one of {known}")
    chosen = split if split is not None else next(iter(found))
    return found[chosen], root / chosen


def _undecoded(table: Any, column: str) -> Any:
    """The dataset with the encoded bytes in a column of images."""
    image = _datasets().Image
    return (
        table.cast_column(column, image(decode=False)) if isinstance(table.features[column], image) else table
    )


def _column(table: Any, name: str) -> list[Any]:
    return table.select_columns([name]).with_format("arrow")[:].column(name).to_pylist()


def _datasets() -> Any:
    # Imported here because datasets is optional and slow to load.
    try:
        import datasets
    except ImportError as error:
        message = "folders of save_to_disk need datasets: pip install 'speedit-plugins[data]'"
        raise ImportError(message) from error
    return datasets


DATASETS.register_module(name="SavedDataset", module=SavedDataset)
