"""The sets that the phase test compares: images or videos of an npz, a folder or a dataset, read in batches.

Dims: N images or videos, B of them in a batch, F frames (absent for images), H x W pixels, C channels.
"""

import copy
import hashlib
import posixpath
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.files import sha256_of
from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.folders import Walk
from speedit_plugins.trainer.data.images import caption_files
from speedit_plugins.trainer.data.images.pixels import read_rgb
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import DATA_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.data.videos.clips import STILL_SUFFIXES
from speedit_plugins.trainer.evaluation.npz import npz_batches, npz_shape
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.results import CAPTIONS, INFERENCE, inferences

# A fingerprint reads this many items, spread over the set: reading all costs as much as their features.
FINGERPRINT_ITEMS = 256


class SampleSet(Protocol):
    """N images or videos. `source` says what they are, `captions_file` where their captions may be.

    `names` are the paths of a folder's samples below the folder, in the order of the samples; None without a
    folder. `num_channels` is C, or None for files that can be read in colour or, after `in_grey`, in grey.
    """

    source: str
    is_video: bool
    captions_file: Path | None
    names: Sequence[str] | None

    @property
    def num_channels(self) -> int | None: ...
    def in_grey(self) -> "SampleSet": ...
    def __len__(self) -> int: ...
    def batches(self, batch_size: int) -> Iterator[Tensor]: ...
    def labels(self) -> Tensor | None: ...
    def fingerprint(self) -> str: ...


class NpzSet:
    """The images of a file in the ADM format."""

    is_video = False
    names: Sequence[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path, self.source = path, str(path)
        self._shape = npz_shape(path)
        # Inference writes the captions beside its images.
        self.captions_file: Path | None = path.with_suffix("") / CAPTIONS

    def __len__(self) -> int:
        return self._shape[0]

    @property
    def num_channels(self) -> int:
        """C, from the file's shape."""
        return self._shape[3]

    def in_grey(self) -> "NpzSet":
        """The same set: the channels of an npz are fixed."""
        return self

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 (B, H, W, C), in the file's order."""
        yield from map(torch.from_numpy, npz_batches(self.path, batch_size))

    def labels(self) -> None:
        """None: the format has no labels to rely on."""

    def fingerprint(self) -> str:
        """SHA-256 of the file, in hexadecimal."""
        return sha256_of(self.path)


class ItemSet:
    """Images or videos, each read by itself.

    Args:
        source: tells a person what they are.
        num_items: N.
        read: reads the item at an index, uint8 ([F,] H, W, C); all have one shape.
        read_grey: reads it with one channel; None if the channels are fixed.
        read_label: reads the label at an index; None if there are no labels.
        names: see `SampleSet`.
    """

    def __init__(
        self,
        source: str,
        num_items: int,
        read: Callable[[int], Tensor],
        *,
        is_video: bool,
        read_grey: Callable[[int], Tensor] | None = None,
        read_label: Callable[[int], int] | None = None,
        captions_file: Path | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.source, self.is_video = source, is_video
        self.captions_file, self.names = captions_file, names
        self._num_items, self._read, self._read_label = num_items, read, read_label
        self._read_grey = read_grey

    def __len__(self) -> int:
        return self._num_items

    @property
    def num_channels(self) -> int | None:
        """C of the first item; None if the items can also be read in grey."""
        return self._read(0).shape[-1] if self._read_grey is None else None

    def in_grey(self) -> "ItemSet":
        """The same items with one channel; the same set if its channels are fixed."""
        grey = copy.copy(self)
        grey._read, grey._read_grey = self._read_grey or self._read, None
        return grey

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """uint8 (B, [F,] H, W, C), in order.

        Raises:
            ValueError: items have different shapes.
        """
        first: torch.Size | None = None
        for start in range(0, len(self), batch_size):
            items = [self._read(i) for i in range(start, min(start + batch_size, len(self)))]
            first = first or items[0].shape
            for i, item in enumerate(items, start):
                if item.shape != first:
                    raise ValueError(
                        f"test compares sets of one shape, got {tuple(item.shape)} after {tuple(first)} at"
                        f" item {i} of {self.source}; a dataset crops to image_size"
                    )
            yield torch.stack(items)

    def labels(self) -> Tensor | None:
        """int64 (N,); None if there are no labels."""
        if self._read_label is None:
            return None
        return torch.tensor([self._read_label(i) for i in range(len(self))])

    def fingerprint(self) -> str:
        """SHA-256 of N and of at most 256 items, spread over the set, in hexadecimal."""
        digest = hashlib.sha256(f"{len(self)}".encode())
        step = -(-len(self) // FINGERPRINT_ITEMS)
        for i in range(0, len(self), step):
            item = self._read(i)
            digest.update(f"\n{tuple(item.shape)}\n".encode())
            digest.update(item.contiguous().numpy().tobytes())
        return digest.hexdigest()


def open_set(path: str | Path, *, key: str) -> NpzSet | ItemSet:
    """The images of an npz, or the images or videos at any depth of a folder, by path and in colour.

    Args:
        key: key of the config that messages name.

    Raises:
        ValueError: the path is neither, or the folder has no images and no videos, or both; or it is that of
            a run's inferences, and has several.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{key} needs an npz or a folder, got {path}, which is not there")
    if not path.is_dir():
        return NpzSet(path)
    path = _one_set(path, key)
    # Inference writes MP4. Imported here, because only videos need PyAV.
    from speedit_plugins.trainer.data.videos.files import SUFFIXES, read_frames, read_header

    walk = Walk(path.resolve(), follow_links=False, suffixes=(*STILL_SUFFIXES, *SUFFIXES))
    files = [Path(file) for file in walk.files(str(walk.root))]
    are_videos = {file.suffix.lower() in SUFFIXES for file in files}
    if len(are_videos) != 1:
        got = "both" if files else "neither"
        raise ValueError(f"{key} needs a folder of images or one of videos, got {path} with {got}")

    def opened(index: int) -> list[Image.Image]:
        if not is_video:
            return [read_rgb(files[index])]
        num_frames = read_header(files[index]).num_frames
        return read_frames(files[index], range(num_frames), num_frames=num_frames)

    def read(index: int, mode: str = "RGB") -> Tensor:
        frames = [
            np.array(frame.convert(mode)).reshape(frame.height, frame.width, -1) for frame in opened(index)
        ]
        return torch.from_numpy(np.stack(frames) if is_video else frames[0])

    is_video = are_videos.pop()
    return ItemSet(
        str(path),
        len(files),
        read,
        is_video=is_video,
        read_grey=partial(read, mode="L"),
        captions_file=path / CAPTIONS,
        names=[file.relative_to(walk.root).as_posix() for file in files],
    )


def _one_set(path: Path, key: str) -> Path:
    """The folder, or the single inference in a run's folder of inferences."""
    if path.name != INFERENCE:
        return path
    sets = [each for each in inferences(path) if each.is_dir()]
    if len(sets) > 1:
        names = ", ".join(each.name for each in sets)
        raise ValueError(f"{key} needs one set of samples, got {path} with {names}; wanted one of these")
    return sets[0] if sets else path


def alike(samples: SampleSet, reference: SampleSet) -> tuple[SampleSet, SampleSet]:
    """Both sets. If one has a single channel, files of the other are read in grey too."""
    if 1 in (samples.num_channels, reference.num_channels):
        return samples.in_grey(), reference.in_grey()
    return samples, reference


def dataset_set(config: ExperimentConfig) -> ItemSet:
    """The experiment's dataset without random flips. Other draws for a sample depend on its index alone.

    Raises:
        ValueError: the dataset has cached latents, or samples of several sizes.
    """
    dataset = build.build_dataset(config, augmented=False)
    if isinstance(dataset, LatentCache) or getattr(dataset, "buckets", None) is not None:
        raise ValueError(
            "test compares images of one size, got a LatentCache or buckets; wanted reference: an npz or a"
            " folder, or the dataset without buckets"
        )
    key = "video" if config.num_frames else "image"
    load = partial(load_item, config, dataset)

    def read(index: int) -> Tensor:
        value = load(index)[key]
        assert isinstance(value, Tensor)
        return torch.from_numpy(images.to_uint8(value[None])[0])

    def read_label(index: int) -> int:
        value = load(index)["label"]
        assert isinstance(value, int)
        return value

    return ItemSet(
        f"dataset {config.data.dataset['type']}",
        len(dataset),
        read,
        is_video=bool(config.num_frames),
        read_label=read_label if config.num_classes else None,
    )


def load_item(config: ExperimentConfig, dataset: SampleSource, index: int) -> dict[str, object]:
    """A sample of the dataset. What is drawn for it depends on the seed and its index alone."""
    generator = torch.Generator().manual_seed(stream_seed(config.seed, DATA_STREAM, 0, index))
    return dict(dataset.load(index, generator))


def read_captions(samples: SampleSet, reader: str = "clip_score") -> list[str]:
    """The caption of each sample, in the samples' order, from the file that inference wrote beside them.

    A folder's samples are identified by file path, an npz's by position.

    Args:
        samples: the samples.
        reader: what needs the captions, for messages.

    Raises:
        ValueError: there is no file, not one caption per sample, a line that is no caption, or for an npz
            another order.
        OSError: the system fails to read the file.
    """
    path = samples.captions_file
    if path is None or not path.is_file():
        raise ValueError(f"{reader} needs the captions of {samples.source}, got no {path}")
    rows = list(caption_files.read_captions(path))
    if len(rows) != len(samples):
        raise ValueError(f"{reader} needs {len(samples)} captions, got {len(rows)} in {path}")
    if samples.names is not None:
        texts = {posixpath.normpath(row.path): row.texts[0] for row in rows}
        if missing := next((name for name in samples.names if name not in texts), None):
            raise ValueError(f"{reader} needs a caption of each sample, got none of {missing} in {path}")
        return [texts[name] for name in samples.names]
    for before, after in pairwise(rows):
        if before.path >= after.path:
            got = f"{after.path} behind {before.path} at {after.where}"
            raise ValueError(f"{reader} needs the captions of {path} in the order of file names, got {got}")
    return [row.texts[0] for row in rows]
