"""Clips cut out of videos: what a set of video files, frame folders and images has in common.

Dims: F frames, H x W pixels after the crop, N videos, K buckets.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.trainer.data.images.folder import ON_CORRUPT, center_crop, read_rgb, read_size
from speedit_plugins.trainer.data.images.folder import SUFFIXES as IMAGE_SUFFIXES
from speedit_plugins.trainer.data.strings import Strings
from speedit_plugins.trainer.data.videos.files import SUFFIXES as VIDEO_SUFFIXES
from speedit_plugins.trainer.data.videos.files import VideoHeader, read_frames, read_header

# A GIF moves.
STILL_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in VIDEO_SUFFIXES)
# Of many videos that cannot be used, an error names so many.
NUM_NAMED = 5


@dataclass(frozen=True)
class Cut:
    """Which frames and pixels of a video make a sample.

    Args:
        num_frames: F, >= 1.
        image_size: side of the square crop in pixels, >= 1.
        frame_interval: a sample takes each so many-th frame, >= 1.
        random_start: its first frame is drawn; False takes the video's first.
        random_flip: mirror left to right with probability 1/2.
        buckets: [num_frames, height, width] of each; then the two sizes above are only those of what an
            experiment samples.

    Raises:
        ValueError: a value out of range, or an interval between the frames of single images.
    """

    num_frames: int
    image_size: int
    frame_interval: int = 1
    random_start: bool = True
    random_flip: bool = False
    buckets: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "image_size", "frame_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"videos need {name} >= 1, got {getattr(self, name)}")
        if self.buckets is not None and not _are_triples(self.buckets):
            raise ValueError(
                "buckets of videos need a list of different [num_frames, height, width], each >= 1, got"
                f" {self.buckets!r}"
            )
        if self.frame_interval > 1 and all(frames == 1 for frames, _, _ in self.shapes):
            raise ValueError(f"frame_interval = {self.frame_interval} has no effect on clips of one frame")

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(F, H, W) of each bucket, or of every sample."""
        if self.buckets is None:
            return [(self.num_frames, self.image_size, self.image_size)]
        return [(frames, height, width) for frames, height, width in self.buckets]

    @property
    def spans(self) -> list[int]:
        """Frames that a video needs for each of the shapes."""
        return [(frames - 1) * self.frame_interval + 1 for frames, _, _ in self.shapes]


@dataclass(frozen=True)
class Entry:
    """A video and what is known of it before it is opened; `line` is its place in a table."""

    path: str
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    line: int = 0


class Clips:
    """Clips of videos, scaled to cover the wanted size and cropped to its centre, as images are.

    A video is a file, a folder of numbered images, or an image, which is a video of one frame. With buckets
    it goes to the one of the nearest aspect ratio among those whose length it can fill, of equally near ones
    to the longest; only images go to buckets of one frame, unless all are such. `buckets` then holds the
    bucket of each video, int64 (N,), else None.

    Args:
        entries: the videos; the frames of each are counted where the entry does not say, and with buckets
            the size is read.
        cut: what becomes of each.
        on_corrupt: "raise" names a video that is missing, too short or damaged; "skip" warns of it once and
            takes the next usable one of the same bucket, with that one's label or caption. One of which
            some frames are damaged is replaced where a sample asks for these.
        table: the file whose lines the entries are, for messages; None where there is none.

    Raises:
        ValueError: an option out of range, no usable video, and with "raise" one that is missing, too short
            or found damaged while its length or size is read.
        OSError: the system fails to read a file.
    """

    channels = 3

    def __init__(
        self, entries: Sequence[Entry], cut: Cut, *, on_corrupt: str, table: Path | None = None
    ) -> None:
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"{type(self).__name__} needs on_corrupt in {ON_CORRUPT}, got {on_corrupt!r}")
        self.image_size, self.num_frames = cut.image_size, cut.num_frames
        self.on_corrupt = on_corrupt
        self._cut = cut
        self._table = table
        self._paths = Strings([entry.path for entry in entries])
        self._lines = torch.tensor([entry.line for entry in entries])
        # Shared memory, so that the workers and this process count each damaged file once.
        self._corrupt = torch.zeros(len(entries), dtype=torch.bool).share_memory_()
        lengths, ratios, faults = _measured(entries, with_sizes=cut.buckets is not None)
        chosen = _nearest_fitting(lengths, ratios, cut)
        for index in np.flatnonzero(chosen < 0).tolist():
            faults.setdefault(index, _too_short(entries[index], int(lengths[index]), cut))
        self._report(faults)
        # 0 of what no sample can be cut from, however often it is tried.
        self._lengths = torch.from_numpy(np.where(chosen < 0, 0, lengths))
        self._shapes = torch.from_numpy(self._placed(chosen, ratios))
        self.buckets = None if cut.buckets is None else self._shapes

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_corrupt(self) -> int:
        """Unusable videos met so far, by all workers together."""
        return int(self._corrupt.sum())

    def path(self, index: int) -> Path:
        """The file or folder behind `index`."""
        return Path(self._paths[index])

    def clip(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """A clip float32 (3, F, H, W) in [-1, 1], and the index of the video that it is of.

        `generator` decides the start, then the flip.

        Raises:
            ValueError: a damaged video with on_corrupt="raise", or with "skip" no usable one of its bucket.
            OSError: the system fails to read the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} videos, got index {index}")
        # Drawn before the file is read: a damaged file does not move the stream.
        start = 0.0
        if self._cut.random_start:
            start = float(torch.rand((), generator=generator, dtype=torch.float64))
        flip = self._cut.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        frames, index = self._read(index, start)
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))  # (F, H, W, 3)
        video = pixels.permute(3, 0, 1, 2) / 127.5 - 1.0  # (3, F, H, W)
        return (video.flip(-1) if flip else video).contiguous(), index

    def _read(self, index: int, start: float) -> tuple[list[Image.Image], int]:
        """Frames of the video at `index`, or of the next usable one of its bucket (cyclically); its index.

        Damage met before does not count: the sample would depend on which ones were asked for earlier.
        """
        shape = int(self._shapes[index])
        (frames, height, width), span = self._cut.shapes[shape], self._cut.spans[shape]
        crop = partial(center_crop, height=height, width=width)
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            length = int(self._lengths[candidate])
            if not length or self._shapes[candidate] != shape:
                continue
            first = int(start * (length - span + 1))
            positions = range(first, first + span, self._cut.frame_interval)
            try:
                return _frames_of(self.path(candidate), positions, num_frames=length, each=crop), candidate
            except ValueError as error:
                message = f"{self._place(candidate)}{error}"
                if self.on_corrupt == "raise":
                    raise ValueError(message) from error
                if not self._corrupt[candidate]:
                    self._corrupt[candidate] = True
                    note = f"{message}; the next usable video takes its place"
                    warnings.warn(note, UserWarning, stacklevel=4)
        raise ValueError(
            f"{type(self).__name__} found no usable video of {frames} frames, {height} x {width}: all"
            f" {int((self._shapes == shape).sum())} are missing, too short or damaged"
        )

    def _report(self, faults: dict[int, str]) -> None:
        """Raises for videos that cannot be used, or with "skip" marks them and warns."""
        if not faults:
            return
        named = "; ".join(f"{self._place(index)}{faults[index]}" for index in sorted(faults)[:NUM_NAMED])
        message = f"{len(faults)} of {len(self)} videos cannot be used: {named}"
        message += "; ..." if len(faults) > NUM_NAMED else ""
        if self.on_corrupt == "raise" or len(faults) == len(self):
            raise ValueError(f"{message} (on_corrupt={self.on_corrupt!r})")
        self._corrupt[list(faults)] = True
        warnings.warn(f"{message}; the next usable ones take their place", UserWarning, stacklevel=4)

    def _placed(self, chosen: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """The shape of each video; of unusable ones the nearest that has usable ones to replace them."""
        occupied = np.unique(chosen[chosen >= 0])
        known = np.array([height / width for _, height, width in self._cut.shapes])[occupied]
        nearest = np.abs(np.log(ratios)[:, None] - np.log(known)).argmin(axis=1)  # (N,)
        placed: np.ndarray = np.where(chosen < 0, occupied[nearest], chosen)
        return placed

    def _place(self, index: int) -> str:
        return f"{self._table}, line {int(self._lines[index])}: " if self._table else ""


def frame_order(path: str) -> list[tuple[int, str]]:
    """Sorts file names by the numbers in them: frame 2 comes before frame 10."""
    parts = re.split(r"([0-9]+)", os.path.basename(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _measured(entries: Sequence[Entry], *, with_sizes: bool) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Frames of each video, int64 (N,), height over width, float64 (N,), and by index what is wrong.

    Where something is, the frames are 0.
    """
    lengths = np.zeros(len(entries), dtype=np.int64)
    ratios = np.ones(len(entries))
    faults: dict[int, str] = {}
    for index, entry in enumerate(entries):
        try:
            lengths[index], ratios[index] = _measure(entry, with_size=with_sizes)
        except ValueError as error:
            faults[index] = str(error)
    return lengths, ratios, faults


def _measure(entry: Entry, *, with_size: bool) -> tuple[int, float]:
    path = Path(entry.path)
    if not path.exists():
        raise ValueError(f"{path}: no such file, wanted a video")
    is_still = _is_still(path)
    if not (is_still or path.is_dir() or path.suffix.lower() in VIDEO_SUFFIXES):
        known = ", ".join((*VIDEO_SUFFIXES, *STILL_SUFFIXES))
        raise ValueError(f"{path} is no video by its suffix, wanted one of {known}, or a folder of frames")
    if is_still and entry.num_frames not in (None, 1):
        raise ValueError(f"{path} is an image, of 1 frame, got num_frames {entry.num_frames}")
    num_frames = 1 if is_still else entry.num_frames
    size = (entry.height, entry.width) if entry.height and entry.width else None
    if num_frames is None or (with_size and size is None):
        header = _header_of(path)
        num_frames = header.num_frames if num_frames is None else num_frames
        size = size or (header.height, header.width)
        if num_frames > header.num_frames:
            raise ValueError(f"{path} has {header.num_frames} frames, got num_frames {num_frames}")
    return num_frames, size[0] / size[1] if size else 1.0


def _too_short(entry: Entry, length: int, cut: Cut) -> str:
    """What the shortest shape asks of a video that is shorter."""
    span, frames = min(zip(cut.spans, (frames for frames, _, _ in cut.shapes), strict=True))
    says = "has" if entry.num_frames is None else "is stated to have"
    interval = f"{frames} frames at an interval of {cut.frame_interval}"
    return f"{entry.path} {says} {length} frames, wanted {span} or more ({interval})"


def _nearest_fitting(lengths: np.ndarray, ratios: np.ndarray, cut: Cut) -> np.ndarray:
    """The shape of each video, int64 (N,); -1 where it has too few frames for all."""
    shapes, spans = cut.shapes, np.array(cut.spans)
    # The first of equally near ones is taken: the longest, then the widest.
    order = np.array(sorted(range(len(shapes)), key=lambda k: (-shapes[k][0], shapes[k][1] / shapes[k][2])))
    single = np.array([frames == 1 for frames, _, _ in shapes])[order]
    fits = lengths[:, None] >= spans[order]  # (N, K)
    if not single.all():
        # A video is not trained as a picture because a picture's bucket happens to have its form.
        fits &= ~single | (lengths == 1)[:, None]
    known = np.log([shapes[k][1] / shapes[k][2] for k in order])
    distance = np.where(fits, np.abs(np.log(ratios)[:, None] - known), np.inf)
    chosen: np.ndarray = np.where(fits.any(axis=1), order[distance.argmin(axis=1)], -1)
    return chosen


def _is_still(path: Path) -> bool:
    return path.suffix.lower() in STILL_SUFFIXES


def _header_of(path: Path) -> VideoHeader:
    if path.is_dir():
        frames = _frame_paths(path)
        return VideoHeader(len(frames), *read_size(frames[0]))
    return VideoHeader(1, *read_size(path)) if _is_still(path) else read_header(path)


def _frames_of(
    path: Path,
    positions: Sequence[int],
    *,
    num_frames: int,
    each: Callable[[Image.Image], Image.Image],
) -> list[Image.Image]:
    """`read_frames`, of a folder of frames or an image too."""
    if not path.is_dir() and not _is_still(path):
        return read_frames(path, positions, num_frames=num_frames, each=each)
    frames = _frame_paths(path) if path.is_dir() else [path]
    if len(frames) < num_frames:
        raise ValueError(f"the video {path} has {len(frames)} frames, wanted {num_frames}")
    return [each(read_rgb(frames[position])) for position in positions]


def _frame_paths(folder: Path) -> list[Path]:
    """The frames of a folder in the order of their numbers."""
    names = (name for name in os.listdir(folder) if name.lower().endswith(STILL_SUFFIXES))
    frames = [folder / name for name in sorted(names, key=frame_order) if not name.startswith(".")]
    if not frames:
        raise ValueError(f"{folder} has no frames (suffixes: {', '.join(STILL_SUFFIXES)})")
    return frames


def _are_triples(buckets: Any) -> bool:
    """A list of different triples of ints >= 1."""
    if not isinstance(buckets, Sequence) or not buckets or not all(isinstance(b, Sequence) for b in buckets):
        return False
    sides = [side for bucket in buckets for side in bucket]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    return whole and all(len(b) == 3 for b in buckets) and len({tuple(b) for b in buckets}) == len(buckets)
