"""Images stored in large files, each addressed by its number: what tars, Parquet and saved tables share.

Dims: H x W pixels after the crop, N samples, K buckets.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.trainer.data.buckets import checked_sides, nearest_buckets
from speedit_plugins.trainer.data.images.fit import Fit
from speedit_plugins.trainer.data.images.folder import check_options
from speedit_plugins.trainer.data.images.pixels import as_tensor, read_rgb, read_size

# A message names at most this many samples.
NUM_NAMED = 3


class ImageBytes(io.BytesIO):
    """An encoded image in memory. Its text is where it is from: decoders put it into their messages."""

    def __init__(self, content: bytes, place: str) -> None:
        super().__init__(content)
        self.place = place

    def __repr__(self) -> str:
        return self.place


@dataclass(frozen=True, slots=True)
class Record:
    """A stored sample: its encoded image, and its captions; () without captions."""

    image: ImageBytes | Path
    texts: tuple[str, ...]


class StoredImages:
    """Images addressed by number, fitted and put into buckets as in `ImageFolder`; arguments as there.

    A subclass sets `has_text`, calls `_number` once it knows its samples, and implements `record`,
    `measured` and `identity`.

    Attributes:
        classes: names of the classes; () without classes.
        labels: class of each sample, int64 (N,).
        buckets: bucket of each sample, int64 (N,); None without buckets.
        left_out: number of samples or files that are not used, by reason.
    """

    channels = 3
    has_text = False

    def __init__(
        self,
        *,
        image_size: int,
        random_flip: bool,
        on_corrupt: str,
        buckets: Sequence[Sequence[int]] | None,
        fit: str,
        pad_color: str | Sequence[int] | None,
        bit_depth: int | None,
    ) -> None:
        check_options(self, image_size=image_size, on_corrupt=on_corrupt, bit_depth=bit_depth)
        self.image_size, self.random_flip, self.on_corrupt = image_size, random_flip, on_corrupt
        self.fit, self.bit_depth = Fit(fit, pad_color), bit_depth
        self._sides = [(image_size, image_size)] if buckets is None else checked_sides(buckets)
        self._has_buckets = buckets is not None
        self.left_out: dict[str, int] = {}
        self.classes: tuple[str, ...] = ()
        self.buckets: Tensor | None = None

    def _number(self, labels: Tensor, classes: tuple[str, ...]) -> None:
        """Fixes the samples: their classes, and their buckets from the images' headers."""
        if not len(labels):
            raise ValueError(f"{type(self).__name__} has no samples{self._without()}")
        self.labels, self.classes = labels, classes
        # In shared memory, so that all workers together count each damaged sample once.
        self._corrupt = torch.zeros(len(labels), dtype=torch.bool).share_memory_()
        if self._has_buckets:
            self.buckets = self._nearest(self.measured())

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without classes."""
        return len(self.classes)

    @property
    def num_corrupt(self) -> int:
        """Number of damaged samples found so far by all workers."""
        return int(self._corrupt.sum())

    @property
    def num_captions(self) -> int:
        """Number of samples with captions."""
        return len(self) if self.has_text else 0

    def identity(self) -> dict[str, str]:
        """Digests of what the samples are, see `identify`."""
        raise NotImplementedError

    def record(self, index: int) -> Record:
        """The stored sample; raises ValueError, with its place, if it is damaged."""
        raise NotImplementedError

    def measured(self) -> np.ndarray:
        """Height and width of each upright image, int64 (N, 2); 0 where the header is damaged."""
        raise NotImplementedError

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1], and "caption" str, "label" int, or both.

        `generator` decides the flip, the part that "random_crop" keeps, and which of several captions.

        Raises:
            ValueError: the sample is damaged and on_corrupt is "raise", or it is "skip" and no sample (of
                this bucket) is readable.
            OSError: the system fails to read a file.
        """
        sample = self.load_all(index, generator)
        if "captions" in sample:
            texts = sample.pop("captions")
            # A single caption uses no random number.
            number = int(torch.randint(len(texts), (), generator=generator)) if len(texts) > 1 else 0
            sample["caption"] = texts[number]
        return sample

    def load_all(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Like `load`, but with all captions of the image: "captions", list of str."""
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} samples, got index {index}")
        # Decided before the file is read, so that a damaged sample does not change later random numbers.
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        place = self.fit.draw(generator)
        image, texts, index = self._read(index)
        height, width = self._sides[0 if self.buckets is None else int(self.buckets[index])]
        scaled = as_tensor(self.fit.apply(image, height, width, place))  # (3, H, W)
        sample: dict[str, Any] = {"image": scaled.flip(-1) if flip else scaled}
        if self.has_text:
            sample["captions"] = list(texts)
        if self.classes or not self.has_text:
            sample["label"] = int(self.labels[index])
        return sample

    def _read(self, index: int) -> tuple[Image.Image, tuple[str, ...], int]:
        """Image and captions of the sample, or of the bucket's next readable one, and its index."""
        for candidate in self._candidates(index):
            try:
                record = self.record(candidate)
                return read_rgb(record.image, bit_depth=self.bit_depth), record.texts, candidate
            except ValueError as error:
                if self.on_corrupt == "raise":
                    raise
                self._corrupt[candidate] = True
                warnings.warn(f"{error}; using the next readable sample instead", UserWarning, stacklevel=4)
        where = "" if self.buckets is None else f" of the bucket {list(self._sides[self.buckets[index]])}"
        raise ValueError(f"{type(self).__name__} found no readable sample: all{where} are damaged")

    def _candidates(self, index: int) -> Iterator[int]:
        """The sample and those of its bucket after it, cyclically, without those known to be damaged."""
        for step in range(len(self)):
            other = (index + step) % len(self)
            if not self._corrupt[other] and (
                self.buckets is None or self.buckets[other] == self.buckets[index]
            ):
                yield other

    def _nearest(self, sizes: np.ndarray) -> Tensor:
        damaged = np.flatnonzero(~sizes.all(axis=1))
        if len(damaged) and self.on_corrupt == "raise":
            # Read again for its message.
            read_size(self.record(int(damaged[0])).image)
        # `load` will warn about a damaged one, and replace it with another one of the square's bucket.
        sizes[damaged] = self.image_size
        return nearest_buckets(torch.from_numpy(sizes[:, 0] / sizes[:, 1]), self._sides)

    def _leave_out(self, reason: str, places: Sequence[str], total: int) -> None:
        """Counts samples as left out; with on_corrupt "raise", an error that names the first ones."""
        if not places:
            return
        named = ", ".join(places[:NUM_NAMED]) + (", ..." if total > NUM_NAMED else "")
        if self.on_corrupt == "raise":
            raise ValueError(
                f"{type(self).__name__}: {reason}: {total}, such as {named}; on_corrupt: skip leaves out what"
                " cannot be used"
            )
        self.left_out[reason] = self.left_out.get(reason, 0) + total

    def _without(self) -> str:
        reasons = ", ".join(f"{number} {reason}" for reason, number in self.left_out.items())
        return f"; left out: {reasons}" if reasons else ""


def size_or_zero(read: Callable[[], ImageBytes | Path]) -> tuple[int, int]:
    """Height and width of the upright image; (0, 0) if it cannot be read."""
    try:
        return read_size(read())
    except ValueError:
        return 0, 0


def own_or_default(
    options: Mapping[str, str | None], defaults: Mapping[str, str], used: Mapping[str, bool]
) -> dict[str, str]:
    """Names of columns or keys: those that are given, else the defaults; only those that are used.

    Raises:
        ValueError: an option is given that has no effect.
    """
    for name, value in options.items():
        if value is not None and not used.get(name, True):
            needed = "text_encoder" if "caption" in name else "num_classes"
            raise ValueError(f"{name} has no effect on a training without {needed}; wanted null")
    return {
        name: value if value is not None else defaults[name]
        for name, value in options.items()
        if used.get(name, True)
    }
