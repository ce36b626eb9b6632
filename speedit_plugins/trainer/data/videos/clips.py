"""Cuts clips out of videos: the common part of the datasets of video files, frame folders and images.

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

from speedit_plugins.trainer.data.identity import identify, portable
from speedit_plugins.trainer.data.images.fit import Fit, Place
from speedit_plugins.trainer.data.images.folder import ON_CORRUPT
from speedit_plugins.trainer.data.images.pixels import read_rgb, read_size, readable_suffixes
from speedit_plugins.trainer.data.listing import stamps_of
from speedit_plugins.trainer.data.strings import Strings
from speedit_plugins.trainer.data.videos.files import SUFFIXES as VIDEO_SUFFIXES
from speedit_plugins.trainer.data.videos.files import VideoHeader, read_frames, read_header

# GIF is listed among the videos, since it may be animated.
STILL_SUFFIXES = tuple(suffix for suffix in readable_suffixes() if suffix not in VIDEO_SUFFIXES)
# An error message names at most this many unusable videos.
NUM_NAMED = 5


@dataclass(frozen=True)
class Cut:
    """Which frames and pixels of a video become a sample.

    Args:
        num_frames: F, >= 1.
        image_size: side of the square crop in pixels, >= 1.
        frame_interval: a clip takes every frame_interval-th frame, >= 1.
        random_start: a clip starts at a random frame; False starts at the first one.
        random_flip: mirror left to right with probability 1/2.
        fit: how a frame becomes H x W pixels; a random crop is the same for all frames of a clip.
        buckets: [num_frames, height, width] of each bucket. With buckets, `num_frames` and `image_size` do
            not affect training; they are the size of the videos that an experiment samples.

    Raises:
        ValueError: a value is out of range, or frame_interval > 1 and all clips have one frame.
    """

    num_frames: int
    image_size: int
    frame_interval: int = 1
    random_start: bool = True
    random_flip: bool = False
    buckets: Sequence[Sequence[int]] | None = None
    fit: Fit = Fit()

    def __post_init__(self) -> None:
        for name in ("num_frames", "image_size", "frame_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"videos need {name} >= 1, got {getattr(self, name)}")
        if self.buckets is not None and not _are_triples(self.buckets):
            raise ValueError(
                "buckets of videos must be a list of different [num_frames, height, width], each >= 1, got"
                f" {self.buckets!r}"
            )
        if self.frame_interval > 1 and all(frames == 1 for frames, _, _ in self.shapes):
            raise ValueError(f"frame_interval = {self.frame_interval} has no effect on clips of one frame")

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(F, H, W) of each bucket; without buckets, the one shape of all samples."""
        if self.buckets is None:
            return [(self.num_frames, self.image_size, self.image_size)]
        return [(frames, height, width) for frames, height, width in self.buckets]

    @property
    def spans(self) -> list[int]:
        """Number of frames that a video must have for each of `shapes`."""
        return [(frames - 1) * self.frame_interval + 1 for frames, _, _ in self.shapes]


@dataclass(frozen=True)
class Entry:
    """A video and what is known before it is opened; `line` is its line in a table."""

    path: str
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    line: int = 0


class Clips:
    """Clips of videos, cropped or padded to the wanted size, like images.

    A video is a file, a folder of numbered images, or an image (a video of one frame).

    With buckets, a video goes to the bucket with the nearest aspect ratio among those it is long enough for.
    A tie goes to the bucket with the most frames. Only images go to buckets of one frame, unless all buckets
    have one frame. The attribute `buckets` holds the bucket index of each video, int64 (N,); without buckets
    it is None. `left_out` counts what is known at the start not to be used, by reason.

    Args:
        entries: the videos. An unknown number of frames is read from the file; with buckets, so is an
            unknown size.
        cut: how to cut samples out of videos.
        on_corrupt: what to do with a video that is missing, too short or damaged. "raise" raises and names
            it. "skip" warns once and uses the next usable video of the same bucket instead, with that video's
            label or caption. If only some frames are damaged, only samples with these frames are replaced.
        base: the data's folder, which names in messages are relative to.
        table: the file that lists the entries, named in messages; None without one.

    Raises:
        ValueError: an option is out of range; no video is usable; or, with "raise", a video is missing, too
            short, or damaged such that its length or size cannot be read.
        OSError: the system fails to read a file.
    """

    channels = 3

    def __init__(
        self, entries: Sequence[Entry], cut: Cut, *, on_corrupt: str, base: Path, table: Path | None = None
    ) -> None:
        if on_corrupt not in ON_CORRUPT:
            raise ValueError(f"{type(self).__name__} needs on_corrupt in {ON_CORRUPT}, got {on_corrupt!r}")
        self.image_size, self.num_frames = cut.image_size, cut.num_frames
        self.on_corrupt = on_corrupt
        self.base = base
        self._cut = cut
        self._table = table
        self._paths = Strings([entry.path for entry in entries])
        self._lines = torch.tensor([entry.line for entry in entries])
        # In shared memory, so that all workers together count each damaged file once.
        self._corrupt = torch.zeros(len(entries), dtype=torch.bool).share_memory_()
        lengths, ratios, faults = _measured(entries, with_sizes=cut.buckets is not None)
        chosen = _nearest_fitting(lengths, ratios, cut)
        for index in np.flatnonzero(chosen < 0).tolist():
            faults.setdefault(index, _too_short(entries[index], int(lengths[index]), cut))
        self._report(faults)
        self.left_out: dict[str, int] = (
            {"missing, too short or damaged videos": len(faults)} if faults else {}
        )
        # Length 0 marks videos that can never give a sample.
        self._lengths = torch.from_numpy(np.where(chosen < 0, 0, lengths))
        self._shapes = torch.from_numpy(self._placed(chosen, ratios))
        self.buckets = None if cut.buckets is None else self._shapes

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def num_corrupt(self) -> int:
        """Number of unusable videos found so far by all workers."""
        return int(self._corrupt.sum())

    def path(self, index: int) -> Path:
        """Path of the file or folder at `index`."""
        return Path(self._paths[index])

    def name(self, index: int) -> str:
        """Path of the file or folder at `index`, relative to the data's folder if it is in there."""
        return portable(self.base, [self._paths[index]])[0]

    def identity(self) -> dict[str, str]:
        """Digests of the names, sizes and times of the files or folders, see `identify`."""
        files, folders = (stamps_of(self.base, self._paths, are_folders=each) for each in (False, True))
        sizes, times = (
            np.where(files.sizes < 0, of_folders, of_files)
            for of_files, of_folders in ((files.sizes, folders.sizes), (files.times, folders.times))
        )
        return identify(names=portable(self.base, self._paths), sizes=sizes, times=times)

    def clip(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """A clip, float32 (3, F, H, W) in [-1, 1], and the index of the video it was cut from.

        `generator` decides the first frame, then the flip, then the part that a random crop keeps.

        Raises:
            ValueError: the video is damaged and on_corrupt is "raise", or it is "skip" and no video of this
                bucket is usable.
            OSError: the system fails to read the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} videos, got index {index}")
        # Decided before the file is read, so that a damaged file does not change later random numbers.
        start = 0.0
        if self._cut.random_start:
            start = float(torch.rand((), generator=generator, dtype=torch.float64))
        flip = self._cut.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        frames, index = self._read(index, start, self._cut.fit.draw(generator))
        pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames]))  # (F, H, W, 3)
        video = pixels.permute(3, 0, 1, 2) / 127.5 - 1.0  # (3, F, H, W)
        return (video.flip(-1) if flip else video).contiguous(), index

    def _read(self, index: int, start: float, place: Place) -> tuple[list[Image.Image], int]:
        """Frames of the video at `index`, or of the bucket's next usable one (cyclically), and its index.

        A damaged video is tried again each time. If it were skipped once known, a sample would depend on
        which samples were loaded before.
        """
        shape = int(self._shapes[index])
        (frames, height, width), span = self._cut.shapes[shape], self._cut.spans[shape]
        crop = partial(self._cut.fit.apply, height=height, width=width, place=place)
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
                    note = f"{message}; using the next usable video instead"
                    warnings.warn(note, UserWarning, stacklevel=4)
        raise ValueError(
            f"{type(self).__name__} found no usable video for {frames} frames of {height} x {width}: all"
            f" {int((self._shapes == shape).sum())} are missing, too short or damaged"
        )

    def _report(self, faults: dict[int, str]) -> None:
        """Raises if there are unusable videos; with "skip" marks them as corrupt and warns."""
        if not faults:
            return
        named = "; ".join(f"{self._place(index)}{faults[index]}" for index in sorted(faults)[:NUM_NAMED])
        message = f"{len(faults)} of {len(self)} videos cannot be used: {named}"
        message += "; ..." if len(faults) > NUM_NAMED else ""
        if self.on_corrupt == "raise" or len(faults) == len(self):
            raise ValueError(f"{message} (on_corrupt={self.on_corrupt!r})")
        self._corrupt[list(faults)] = True
        warnings.warn(f"{message}; using the next usable ones instead", UserWarning, stacklevel=4)

    def _placed(self, chosen: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """Shape index of each video. An unusable video gets the nearest shape that some usable video has."""
        occupied = np.unique(chosen[chosen >= 0])
        known = np.array([height / width for _, height, width in self._cut.shapes])[occupied]
        nearest = np.abs(np.log(ratios)[:, None] - np.log(known)).argmin(axis=1)  # (N,)
        placed: np.ndarray = np.where(chosen < 0, occupied[nearest], chosen)
        return placed

    def _place(self, index: int) -> str:
        return f"{self._table}, line {int(self._lines[index])}: " if self._table else ""


def frame_order(path: str) -> list[tuple[int, str]]:
    """Sort key for file names with numbers in them: frame 2 comes before frame 10."""
    parts = re.split(r"([0-9]+)", os.path.basename(path))
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _measured(entries: Sequence[Entry], *, with_sizes: bool) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Number of frames int64 (N,), height / width float64 (N,), and an error message per unusable index.

    Unusable videos have 0 frames.
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
        raise ValueError(f"{path} has no video suffix, wanted one of {known}, or a folder of frames")
    if is_still and entry.num_frames not in (None, 1):
        raise ValueError(f"{path} is an image: wanted num_frames 1, got {entry.num_frames}")
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
    """Error message for a video that is too short even for the shortest shape."""
    span, frames = min(zip(cut.spans, (frames for frames, _, _ in cut.shapes), strict=True))
    says = "has" if entry.num_frames is None else "is listed with"
    interval = f"{frames} frames at an interval of {cut.frame_interval}"
    return f"{entry.path} {says} {length} frames, wanted at least {span} ({interval})"


def _nearest_fitting(lengths: np.ndarray, ratios: np.ndarray, cut: Cut) -> np.ndarray:
    """Shape index of each video, int64 (N,); -1 if it has too few frames for every shape."""
    shapes, spans = cut.shapes, np.array(cut.spans)
    # argmin takes the first of a tie: sorted so that the longest comes first, then the widest.
    order = np.array(sorted(range(len(shapes)), key=lambda k: (-shapes[k][0], shapes[k][1] / shapes[k][2])))
    single = np.array([frames == 1 for frames, _, _ in shapes])[order]
    fits = lengths[:, None] >= spans[order]  # (N, K)
    if not single.all():
        # A video must not be reduced to one frame just because an image bucket has its aspect ratio.
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
    """Like `read_frames`, but also for a folder of frames or an image."""
    if not path.is_dir() and not _is_still(path):
        return read_frames(path, positions, num_frames=num_frames, each=each)
    frames = _frame_paths(path) if path.is_dir() else [path]
    if len(frames) < num_frames:
        raise ValueError(f"the video {path} has {len(frames)} frames, wanted {num_frames}")
    return [each(read_rgb(frames[position])) for position in positions]


def _frame_paths(folder: Path) -> list[Path]:
    """Paths of the frames in a folder, in numeric order."""
    names = (name for name in os.listdir(folder) if name.lower().endswith(STILL_SUFFIXES))
    frames = [folder / name for name in sorted(names, key=frame_order) if not name.startswith(".")]
    if not frames:
        raise ValueError(f"{folder} has no frames (suffixes: {', '.join(STILL_SUFFIXES)})")
    return frames


def _are_triples(buckets: Any) -> bool:
    """Whether `buckets` is a non-empty list of different triples of ints >= 1."""
    if not isinstance(buckets, Sequence) or not buckets or not all(isinstance(b, Sequence) for b in buckets):
        return False
    sides = [side for bucket in buckets for side in bucket]
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides)
    return whole and all(len(b) == 3 for b in buckets) and len({tuple(b) for b in buckets}) == len(buckets)
