"""Images in Parquet files, as Hugging Face's datasets are stored.

Dims: N samples, G row groups.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.archives.columns import (
    DEFAULTS,
    check_columns,
    class_names,
    features_of,
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
from speedit_plugins.trainer.data.archives.index import indexed
from speedit_plugins.trainer.data.archives.labels import numbered
from speedit_plugins.trainer.data.archives.sources import Root, find_files
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.order import ChunkedOrder
from speedit_plugins.trainer.data.parquet_files import UnreadableError, naming_damage, pyarrow_parquet

# What each loading process keeps of the files in memory, where `shuffle_window` is not given.
WINDOW_BYTES = 2**28
# Row groups that are larger than this are warned of.
LARGE_BYTES = 2**30
# Open files of a process.
MOST_OPEN = 64


class ParquetImages(StoredImages):
    """Images in Parquet files: a row is a sample, with the image's encoded bytes in a column.

    An image is stored as Hugging Face's `Image` does, {"bytes", "path"}, or as bytes alone, or as a path
    relative to its file. A caption is a text or a list of texts; a training step takes one of them. A label
    is a number or a name. The names of the classes come from the files' `ClassLabel`, if they have one.

    Only the row groups in use are in memory. Each epoch goes through the row groups in another order and
    mixes the samples of `shuffle_window` of them. Every loading process holds these. Files with few large row
    groups need much memory: write them with `row_group_size=100`.

    Args:
        root: a file, a folder of .parquet files, a pattern (`train-*.parquet`), or a list of these; local.
        image_size: side of the square crop in pixels, >= 1.
        class_cond: samples have a label.
        text: samples have a caption. Without both, every label is 0.
        image_column: name of the images' column; null is `image`.
        caption_column: name of the captions' column; null is `text`.
        label_column: name of the labels' column; null is `label`.
        random_flip: mirror left to right with probability 1/2.
        on_corrupt: "raise" raises at a file that cannot be read, at a row without a label, and at a damaged
            image or caption; the message names file and row. "skip" leaves out and counts the first two; in
            place of a damaged sample it uses the next readable one.
        buckets: as in `ImageFolder`. The first start reads all images for it, and keeps their sizes in
            `speedit/folders` in $XDG_CACHE_HOME or ~/.cache.
        fit: as in `ImageFolder`.
        pad_color: as in `ImageFolder`.
        bit_depth: as in `ImageFolder`.
        shuffle_window: number of row groups whose samples are mixed, >= 1; null takes as many as 256 MiB
            hold.

    Raises:
        ValueError: no such file, a remote address, a missing column, an option that has no effect; with
            "raise" also what is named there.
        ImportError: pyarrow is missing.
        OSError: the system fails to read a file.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: Root,
        *,
        image_size: int,
        class_cond: bool = False,
        text: bool = False,
        image_column: str | None = None,
        caption_column: str | None = None,
        label_column: str | None = None,
        random_flip: bool = False,
        on_corrupt: str = "raise",
        buckets: Sequence[Sequence[int]] | None = None,
        fit: str = "crop",
        pad_color: str | Sequence[int] | None = None,
        bit_depth: int | None = None,
        shuffle_window: int | None = None,
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
        if shuffle_window is not None and shuffle_window < 1:
            raise ValueError(f"ParquetImages needs shuffle_window >= 1, got {shuffle_window}")
        self.has_text = text
        self._columns = own_or_default(
            {"image_column": image_column, "caption_column": caption_column, "label_column": label_column},
            DEFAULTS,
            {"caption_column": text, "label_column": class_cond},
        )
        self._files = find_files(root, suffix=".parquet", reader="ParquetImages")
        self._forget()
        self._class_names: tuple[str, ...] | None = None
        groups, values = self._scan(class_cond)
        # File, number in the file, first row in the file, rows, bytes: int64 (G, 5).
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 5)
        rows = np.arange(self._groups[:, 3].sum())
        group_of = np.repeat(np.arange(len(self._groups)), self._groups[:, 3])
        self._starts = np.cumsum(self._groups[:, 3]) - self._groups[:, 3]
        if class_cond:
            rows = self._labelled(rows, group_of, values)
            values = [value for value in values if value]
        classes, labels = (
            numbered(values, self._class_names) if class_cond else ((), torch.zeros(len(rows)).long())
        )
        self._rows, self._group_of = rows, group_of[rows]
        self._window = shuffle_window or self._fitting_window()
        self._number(labels, classes)
        self.chunked = ChunkedOrder(torch.from_numpy(self._group_of.copy()), self._window)

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to another process.
        return {**self.__dict__, "_pid": 0, "_readers": {}, "_tables": {}}

    def name(self, index: int) -> str:
        """File and row of a sample."""
        group = int(self._group_of[index])
        return self._place(group, int(self._rows[index] - self._starts[group]))[1]

    def identity(self) -> dict[str, str]:
        """Digests of the rows' numbers, classes, labels, and sizes and times of the files."""
        facts = [path.stat() for path in self._files]
        file_of = self._groups[self._group_of, 0]
        return identify(
            names=self._rows,
            classes=self.classes,
            labels=self.labels.numpy(),
            sizes=np.array([fact.st_size for fact in facts], dtype=np.int64)[file_of],
            times=np.array([fact.st_mtime_ns for fact in facts], dtype=np.int64)[file_of],
        )

    def record(self, index: int) -> Record:
        """The image's bytes and the captions of a row."""
        group = int(self._group_of[index])
        row = int(self._rows[index] - self._starts[group])
        path, place = self._place(group, row)
        table = self._table(group)
        image = image_of(table.column(self._columns["image_column"])[row].as_py(), path.parent, place)
        if not self.has_text:
            return Record(image, ())
        return Record(image, texts_of(table.column(self._columns["caption_column"])[row].as_py(), place))

    @property
    def max_captions(self) -> int:
        """Largest number of captions that one image has, 0 without text; reads all captions."""
        column = self._columns.get("caption_column")
        if column is None:
            return 0
        counts = [
            len(value) if isinstance(value, list) else 1
            for group in np.unique(self._group_of).tolist()
            for value in self._read_group(group, [column]).column(column).to_pylist()
        ]
        return max(counts, default=1)

    def measured(self) -> np.ndarray:
        """Height and width of each upright image, read once and kept, int64 (N, 2); 0 for a damaged one."""
        every = [self._sizes(file) for file in range(len(self._files))]
        return np.concatenate(every)[self._rows]

    def _sizes(self, file: int) -> np.ndarray:
        """Sizes of all rows of a file."""
        column = self._columns["image_column"]

        def measure() -> dict[str, np.ndarray]:
            groups = np.flatnonzero(self._groups[:, 0] == file).tolist()
            sizes = [size for group in groups for size in self._sizes_in(group, column)]
            return {"sizes": np.array(sizes, dtype=np.int64).reshape(-1, 2)}

        return indexed(self._files[file], f"sizes in {column}", measure)["sizes"]

    def _sizes_in(self, group: int, column: str) -> list[tuple[int, int]]:
        try:
            values = self._read_group(group, [column]).column(column)
        except ValueError:
            return [(0, 0)] * int(self._groups[group, 3])
        places = [self._place(group, row) for row in range(len(values))]
        return [
            size_or_zero(partial(image_of, value.as_py(), path.parent, place))
            for value, (path, place) in zip(values, places, strict=True)
        ]

    def _scan(self, class_cond: bool) -> tuple[list[list[int]], list[str]]:
        """The row groups of all files, and the labels of all rows as text."""
        groups: list[list[int]] = []
        values: list[str] = []
        columns = list(self._columns.values())
        for number, path in enumerate(self._files):
            try:
                reader = self._reader(number)
                check_columns(self._columns, reader.schema_arrow.names, path)
                self._check_names(path, reader.schema_arrow.metadata, is_first=not groups)
                labels = self._labels(reader, path) if class_cond else []
            except UnreadableError as error:
                self._leave_out("files that cannot be read", [str(error)], 1)
                continue
            values += labels
            first = 0
            for group in range(reader.num_row_groups):
                facts = reader.metadata.row_group(group)
                size = _bytes_of(facts, columns)
                groups.append([number, group, first, facts.num_rows, size])
                first += facts.num_rows
                if size > LARGE_BYTES:
                    warnings.warn(
                        f"{path}: row group {group} takes {size / 2**30:.1f} GiB in every loading process;"
                        " write the file with row_group_size=100",
                        UserWarning,
                        stacklevel=4,
                    )
        return groups, values

    def _check_names(self, path: Path, metadata: Mapping[bytes, bytes] | None, *, is_first: bool) -> None:
        """Takes the names of the classes from the first file; raises if another one's differ."""
        if "label_column" not in self._columns:
            return
        names = class_names(features_of(metadata), self._columns["label_column"])
        if not is_first and names != self._class_names:
            raise ValueError(f"{path} has other names of classes than {self._files[0]}")
        self._class_names = names

    def _labels(self, reader: Any, path: Path) -> list[str]:
        column = self._columns["label_column"]
        with naming_damage(path):
            values = reader.read(columns=[column], use_threads=False).column(column)
            return [label_of(value, self._class_names) for value in values.to_pylist()]

    def _labelled(self, rows: np.ndarray, group_of: np.ndarray, values: list[str]) -> np.ndarray:
        """The rows that have a label."""
        has = np.array([bool(value) for value in values])
        lacking = rows[~has]
        places = [
            self._place(int(group_of[row]), int(row - self._starts[group_of[row]]))[1]
            for row in lacking[:NUM_NAMED]
        ]
        self._leave_out("samples without a usable label", places, len(lacking))
        return rows[has]

    def _fitting_window(self) -> int:
        """Number of row groups that `WINDOW_BYTES` hold, >= 1."""
        largest = int(self._groups[:, 4].max(initial=1))
        return max(1, WINDOW_BYTES // largest)

    def _place(self, group: int, row: int) -> tuple[Path, str]:
        """The file of a row, and where the row is."""
        file, _, first, _, _ = self._groups[group].tolist()
        return self._files[file], f"{self._files[file]}, row {first + row}"

    def _table(self, group: int) -> Any:
        """The columns of a row group; the last ones that were used stay in memory."""
        if self._pid != os.getpid():
            # A forked worker opens files of its own, and does not keep what its parent had read.
            self._forget()
        table = self._tables.pop(group, None)
        if table is None:
            names = [name for option, name in self._columns.items() if option != "label_column"]
            table = self._read_group(group, names)
        self._tables[group] = table  # the last one is the newest
        if len(self._tables) > self._window:
            self._tables.pop(next(iter(self._tables)))
        return table

    def _read_group(self, group: int, columns: list[str]) -> Any:
        file, number = self._groups[group, :2].tolist()
        with naming_damage(self._files[file]):
            # One thread: the workers already run in parallel.
            return self._reader(file).read_row_group(number, columns=columns, use_threads=False)

    def _reader(self, file: int) -> Any:
        reader = self._readers.pop(file, None)
        if reader is None:
            with naming_damage(self._files[file]):
                reader = pyarrow_parquet().ParquetFile(self._files[file], memory_map=True, pre_buffer=False)
        self._readers[file] = reader
        if len(self._readers) > MOST_OPEN:
            self._readers.pop(next(iter(self._readers)))
        return reader

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._readers: dict[int, Any] = {}
        self._tables: dict[int, Any] = {}


def _bytes_of(facts: Any, columns: Sequence[str]) -> int:
    """Bytes of these columns of a row group, decompressed."""
    parts = (facts.column(number) for number in range(facts.num_columns))
    return sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)


DATASETS.register_module(name="ParquetImages", module=ParquetImages)
