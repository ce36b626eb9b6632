"""Images in tars, as the package webdataset writes them.

Dims: N samples.
"""

import io
import json
import os
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.archives.images import (
    NUM_NAMED,
    ImageBytes,
    Record,
    StoredImages,
    own_or_default,
    size_or_zero,
)
from speedit_plugins.trainer.data.archives.index import indexed
from speedit_plugins.trainer.data.archives.labels import numbered
from speedit_plugins.trainer.data.archives.sources import Root, find_files
from speedit_plugins.trainer.data.archives.tar import TarIndex, read_tar_index
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.pixels import readable_suffixes
from speedit_plugins.trainer.data.order import ChunkedOrder
from speedit_plugins.trainer.data.strings import Strings

CAPTION, LABEL = "txt", "cls"
# A key json:FIELD means that field of the member with the extension json.
JSON = "json:"
# Open files of a process.
MOST_OPEN = 64


class WebDataset(StoredImages):
    """Images in tars: the files of a sample follow each other and have one name, up to the first dot.

    `000.jpg`, `000.txt` and `000.cls` are an image, its caption and its class. A class is a number or a name.
    The tars are not unpacked. The first start reads through them, and keeps an index of each in
    `speedit/folders` in $XDG_CACHE_HOME or ~/.cache. With it every sample is read by itself: tars are
    shuffled, shared between processes and resumed within, whatever their number is.

    Each epoch goes through the tars in another order and mixes the samples of `shuffle_window` of them.

    Args:
        root: a tar, a folder of tars, a pattern (`*.tar`, `{000..099}.tar`), or a list of these; local files.
        image_size: side of the square crop in pixels, >= 1.
        class_cond: samples have a label, from `label_key`.
        text: samples have a caption, from `caption_key`. Without both, every label is 0.
        image_key: extension of the image, such as `jpg` or `seg.png`; null takes the one image of a sample.
        caption_key: extension of the caption's file, or `json:FIELD`; null is `txt`.
        label_key: extension of the label's file, or `json:FIELD`; null is `cls`.
        random_flip: mirror left to right with probability 1/2.
        on_corrupt: "raise" raises at a tar that is cut off, at a sample that lacks a part, and at a damaged
            one; the message names tar and key. "skip" leaves out and counts what is known at the start; in
            place of a damaged sample it uses the next readable one.
        buckets: as in `ImageFolder`. The first start reads all images for it, and keeps their sizes.
        fit: as in `ImageFolder`.
        pad_color: as in `ImageFolder`.
        bit_depth: as in `ImageFolder`.
        shuffle_window: number of tars whose samples are mixed, >= 1.

    Raises:
        ValueError: no such file, a remote address, no tar, an option that has no effect; with "raise" also
            what is named there.
        OSError: the system fails to read a file.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: Root,
        *,
        image_size: int,
        class_cond: bool = False,
        text: bool = False,
        image_key: str | None = None,
        caption_key: str | None = None,
        label_key: str | None = None,
        random_flip: bool = False,
        on_corrupt: str = "raise",
        buckets: Sequence[Sequence[int]] | None = None,
        fit: str = "crop",
        pad_color: str | Sequence[int] | None = None,
        bit_depth: int | None = None,
        shuffle_window: int = 16,
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
        if shuffle_window < 1:
            raise ValueError(f"WebDataset needs shuffle_window >= 1, got {shuffle_window}")
        self.has_text = text
        self._image_key = None if image_key is None else image_key.lower()
        self._keys = own_or_default(
            {"caption_key": caption_key, "label_key": label_key},
            {"caption_key": CAPTION, "label_key": LABEL},
            {"caption_key": text, "label_key": class_cond},
        )
        self._files = find_files(root, suffix=".tar", reader="WebDataset")
        self._open: dict[int, io.FileIO] = {}
        names: list[str] = []
        values: list[str] = []
        tables: list[np.ndarray] = []
        for shard in range(len(self._files)):
            keys, table, labels = self._samples(shard)
            names += keys
            values += labels
            tables.append(table)
        # Shard, offset and size of the image, offset and size of the caption, int64 (N, 5).
        self._table = np.concatenate(tables)
        self._names = Strings(names)
        classes, labels_of = numbered(values) if class_cond else ((), torch.zeros(len(names)).long())
        self._number(labels_of, classes)
        self.chunked = ChunkedOrder(torch.from_numpy(self._table[:, 0].copy()), shuffle_window)

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be sent to another process.
        return {**self.__dict__, "_open": {}}

    def name(self, index: int) -> str:
        """Tar and key of a sample."""
        return f"{self._files[int(self._table[index, 0])]}, key {self._names[index]}"

    def identity(self) -> dict[str, str]:
        """Digests of the keys, classes, labels, sizes of images and captions, and times of the tars."""
        times = np.array([path.stat().st_mtime_ns for path in self._files], dtype=np.int64)
        return identify(
            names=self._names,
            classes=self.classes,
            labels=self.labels.numpy(),
            sizes=self._table[:, 2] + self._table[:, 4],
            times=times[self._table[:, 0]],
        )

    def record(self, index: int) -> Record:
        """The image's bytes and the caption of a sample."""
        image = self._image(index)
        if not self.has_text:
            return Record(image, ())
        shard, _, _, offset, size = self._table[index].tolist()
        content = self._bytes(shard, offset, size, image.place)
        return Record(image, (_value(content, self._keys["caption_key"], image.place),))

    def _image(self, index: int) -> ImageBytes:
        shard, offset, size, _, _ = self._table[index].tolist()
        place = self.name(index)
        return ImageBytes(self._bytes(shard, offset, size, place), place)

    def measured(self) -> np.ndarray:
        """Height and width of each upright image, read once and kept, int64 (N, 2); 0 for a damaged one."""
        rows = [np.flatnonzero(self._table[:, 0] == shard) for shard in range(len(self._files))]
        return np.concatenate([self._sizes(shard, of_shard) for shard, of_shard in enumerate(rows)])

    def _sizes(self, shard: int, rows: np.ndarray) -> np.ndarray:
        def measure() -> dict[str, np.ndarray]:
            sizes = [size_or_zero(partial(self._image, row)) for row in rows.tolist()]
            return {"sizes": np.array(sizes, dtype=np.int64).reshape(-1, 2)}

        name = f"sizes {_crc(self._table[rows, 1:3])}"
        return indexed(self._files[shard], name, measure)["sizes"].copy()

    def _samples(self, shard: int) -> tuple[list[str], np.ndarray, list[str]]:
        """Keys, rows of the table, and labels as text of the samples of a tar that can be used."""
        path = self._files[shard]
        index = self._index(path)
        if index is None:
            return [], np.zeros((0, 5), dtype=np.int64), []
        image = self._images(path, index)
        parts = {"image": image}
        parts |= {name[:-4]: index.parts(_extension(key)) for name, key in self._keys.items()}
        usable = np.ones(len(index.keys), dtype=bool)
        for name, (offset, _) in parts.items():
            lacking = np.flatnonzero(usable & (offset < 0))
            usable &= offset >= 0
            self._leave_out(f"samples without {name}", *_named(path, index, lacking))
        labels: list[str] = []
        if "label" in parts:
            labels = self._labels(shard, np.stack(parts["label"], axis=1)[usable])
            damaged = np.flatnonzero(usable)[[not label for label in labels]]
            usable[damaged] = False
            self._leave_out("samples with a damaged label", *_named(path, index, damaged))
            labels = [label for label in labels if label]
        rows = np.flatnonzero(usable)
        caption = parts.get("caption", image)
        table = np.stack([np.full(len(usable), shard), *image, *caption], axis=1)[rows]
        return [index.keys[row] for row in rows.tolist()], table, labels

    def _index(self, path: Path) -> TarIndex | None:
        """The index of a tar; None if it cannot be used at all."""
        try:
            index = read_tar_index(path)
        except ValueError as error:
            self._leave_out("shards that cannot be read", [str(error)], 1)
            return None
        if index.fault:
            self._leave_out("shards that are not whole", [f"{path}: {index.fault}"], 1)
        repeated = index.repeated()
        self._leave_out("parts that appear twice", [f"{path}, {name}" for name in repeated], len(repeated))
        return index

    def _images(self, path: Path, index: TarIndex) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size of the image of each sample; offset -1 without."""
        if self._image_key is not None:
            return index.parts(self._image_key)
        kinds = [kind for kind in index.extensions if f".{kind}" in readable_suffixes()]
        offset, size = index.parts("")
        for kind in kinds:
            others, sizes = index.parts(kind)
            if len(twice := np.flatnonzero((offset >= 0) & (others >= 0))):
                has = [other for other in kinds if index.parts(other)[0][twice[0]] >= 0]
                raise ValueError(
                    f"{path}, key {index.keys[twice[0]]}: wanted one image, got {' and '.join(has)};"
                    " image_key chooses one"
                )
            offset, size = np.where(others >= 0, others, offset), np.where(others >= 0, sizes, size)
        return offset, size

    def _labels(self, shard: int, parts: np.ndarray) -> list[str]:
        """The labels at these offsets and sizes (N, 2), read once and kept; "" for a damaged one."""
        key = self._keys["label_key"]

        def read() -> dict[str, np.ndarray]:
            texts = [self._label(shard, offset, size) for offset, size in parts.tolist()]
            return Strings(texts).arrays("labels")

        arrays = indexed(self._files[shard], f"labels {_crc(parts, key)}", read)
        return list(Strings.from_arrays("labels", arrays))

    def _label(self, shard: int, offset: int, size: int) -> str:
        try:
            return _value(self._bytes(shard, offset, size, ""), self._keys["label_key"], "")
        except ValueError:
            return ""

    def _bytes(self, shard: int, offset: int, size: int, place: str) -> bytes:
        file = self._open.pop(shard, None) or io.FileIO(self._files[shard])
        self._open[shard] = file  # the last one is the newest
        if len(self._open) > MOST_OPEN:
            self._open.pop(next(iter(self._open))).close()
        # Forked workers share a file's position, so it is not used.
        content = os.pread(file.fileno(), size, offset)
        if len(content) < size:
            raise ValueError(f"{place}: the tar was cut off after its index was made")
        return content


def _named(path: Path, index: TarIndex, rows: np.ndarray) -> tuple[list[str], int]:
    """Places of the first of these samples, and their number."""
    return [f"{path}, key {index.keys[row]}" for row in rows[:NUM_NAMED].tolist()], len(rows)


def _extension(key: str) -> str:
    return "json" if key.startswith(JSON) else key.lower()


def _value(content: bytes, key: str, place: str) -> str:
    """The text of a member, or of its field; raises ValueError if there is none."""
    try:
        text = content.decode("utf-8")
        value = json.loads(text)[key.removeprefix(JSON)] if key.startswith(JSON) else text
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{place}: wanted text in {key}: {type(error).__name__}: {error}") from error
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{place}: wanted text in {key}, got {value!r}")
    if not str(value).strip():
        raise ValueError(f"{place}: {key} is empty")
    return str(value).strip()


def _crc(parts: np.ndarray, key: str = "") -> str:
    return f"{zlib.crc32(np.ascontiguousarray(parts).tobytes(), zlib.crc32(key.encode())):08x}"


DATASETS.register_module(name="WebDataset", module=WebDataset)
