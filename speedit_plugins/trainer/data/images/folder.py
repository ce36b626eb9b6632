"""Images from a folder, with or without classes, at one size or in aspect-ratio buckets.

Dims: H x W pixels of a sample, N images.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.buckets import checked_sides, nearest_buckets
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.fit import Fit
from speedit_plugins.trainer.data.images.pixels import (
    BIT_DEPTHS,
    as_tensor,
    read_rgb,
    read_size,
    readable_suffixes,
)
from speedit_plugins.trainer.data.listing import Listing, Stamps, facts_of, list_files, stamps_of
from speedit_plugins.trainer.data.strings import Strings

ON_CORRUPT = ("raise", "skip")


class Images:
    """N image files as samples: what all datasets of image files share.

    Attributes: `channels`, `image_size`, `buckets`, `num_corrupt`.

    Args:
        base: folder that names are relative to.
        source: the folder or file that lists the images; a kept index belongs to it.
        names: paths of the images.
        stamps: their sizes and times.
        image_size: see `ImageFolder`, as all other arguments.

    Raises:
        ValueError: an option is invalid; or, with buckets and "raise", an image header is damaged.
        OSError: with buckets, the system fails to read a file.
    """

    channels = 3

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        base: Path,
        names: Strings,
        stamps: Stamps,
        *,
        source: str,
        image_size: int,
        random_flip: bool,
        on_corrupt: str,
        buckets: Sequence[Sequence[int]] | None,
        fit: Fit,
        bit_depth: int | None,
    ) -> None:
        self.image_size = image_size
        self.random_flip = random_flip
        self.on_corrupt = on_corrupt
        self.fit = fit
        self.bit_depth = bit_depth
        self._base, self._names, self._stamps = base, names, stamps
        self._sides = [(image_size, image_size)] if buckets is None else checked_sides(buckets)
        self.buckets = None if buckets is None else self._nearest_buckets(source)
        # In shared memory, so that all workers together count each damaged file once.
        self._corrupt = torch.zeros(len(names), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def num_corrupt(self) -> int:
        """Number of damaged files found so far by all workers."""
        return int(self._corrupt.sum())

    def name(self, index: int) -> str:
        """Path of the image at `index`, relative to the data's folder."""
        return self._names[index]

    def path(self, index: int) -> Path:
        """Path of the image at `index`."""
        return self._base / self._names[index]

    def identity(self) -> dict[str, str]:
        """Digests of the names, sizes and times of the files, see `identify`."""
        return identify(names=self._names, sizes=self._stamps.sizes, times=self._stamps.times)

    def image(self, index: int, generator: torch.Generator) -> tuple[Tensor, int]:
        """An image, float32 (3, H, W) in [-1, 1], and the index of the file it comes from.

        `generator` decides the flip, then the part that "random_crop" keeps.

        Raises:
            ValueError: the file is damaged and on_corrupt is "raise", or it is "skip" and no file (of this
                bucket) is readable.
            OSError: the system fails to read the file.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{type(self).__name__} has {len(self)} images, got index {index}")
        # Decided before the file is read, so that a damaged file does not change later random numbers.
        flip = self.random_flip and bool(torch.rand((), generator=generator) < 0.5)
        place = self.fit.draw(generator)
        image, index = self._read(index)
        height, width = self._sides[0 if self.buckets is None else int(self.buckets[index])]
        scaled = as_tensor(self.fit.apply(image, height, width, place))  # (3, H, W)
        return scaled.flip(-1) if flip else scaled, index

    def _read(self, index: int) -> tuple[Image.Image, int]:
        """The image at `index`, or the next readable one of the bucket (cyclically), and its index."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            if self._corrupt[candidate] or not self._shares_bucket(index, candidate):
                continue
            path = self.path(candidate)
            try:
                return read_rgb(path, bit_depth=self.bit_depth), candidate
            except ValueError as error:
                if self.on_corrupt == "raise":
                    raise
                self._corrupt[candidate] = True
                warnings.warn(f"{error}; using the next readable image instead", UserWarning, stacklevel=4)
        where = f"below {self._base}"
        if self.buckets is not None:
            where += f" in the bucket {list(self._sides[int(self.buckets[index])])}"
        num_damaged = sum(self._shares_bucket(index, other) for other in range(len(self)))
        raise ValueError(
            f"{type(self).__name__} found no readable image: all {num_damaged} files {where} are damaged"
        )

    def _shares_bucket(self, index: int, other: int) -> bool:
        return self.buckets is None or bool(self.buckets[index] == self.buckets[other])

    def _nearest_buckets(self, source: str) -> Tensor:
        """Bucket index of each image, from the size in its header, int64 (N,)."""

        def read(index: int) -> str:
            try:
                height, width = read_size(self.path(index))
            except ValueError:
                if self.on_corrupt == "raise":
                    raise
                # `load` will warn about this file and replace it with another one of the square's bucket.
                return ""
            return f"{height} {width}"

        what = f"sides of the images in {os.path.realpath(source)}"
        sides = facts_of(self._base, self._names, self._stamps, what=what, read=read)
        pairs = np.array([text.split() or (1, 1) for text in sides], dtype=np.float64)  # (N, 2)
        return nearest_buckets(torch.from_numpy(pairs[:, 0] / pairs[:, 1]), self._sides)


class ImageFolder(Images):
    """Images below `root`, cropped or padded to one size, sorted by class name and then by path.

    With classes, the layout is ImageNet's: one folder per class directly below `root`; images may be nested
    deeper inside. Labels follow the sorted folder names. Without classes, all images at any depth are used
    and every label is 0. Hidden names (a leading dot) are skipped. Other files are counted in `left_out`.

    With buckets, an image goes to the bucket with the nearest aspect ratio and is fitted into it. Creating
    the dataset then reads the header of every file. The attribute `buckets` holds the bucket index of each
    image, int64 (N,); without buckets it is None.

    From 10,000 images on, the list of files and the sizes of images are kept in `speedit/folders` in
    $XDG_CACHE_HOME or ~/.cache. The next start then reads only what changed.

    Attributes: `classes`, `num_classes`, `labels`, `channels`, `image_size`, `buckets`, `left_out` (number of
    files that are not read, by suffix), `num_corrupt`.

    Args:
        root: the folder; may be a symbolic link.
        image_size: side of the square sample in pixels, >= 1. With buckets it does not affect training; it is
            the size of the images that an experiment samples.
        class_cond: take labels from folder names; False for unconditional training.
        random_flip: mirror left to right with probability 1/2.
        on_corrupt: what to do with a damaged file. "raise" raises and names it. "skip" warns once per file
            and uses the next readable image with its label instead, within the same bucket. A damaged header
            counts as a square image. Failures of the system (permission, disk) always raise.
        follow_links: True allows symbolic links that lead out of `root`.
        buckets: [height, width] of each bucket in pixels, all of different aspect ratios; None makes every
            image a square.
        fit: "crop" scales an image to cover the sample and keeps the centre, as ADM does. "random_crop" keeps
            a random part. "pad" scales it to lie within the sample and fills the rest with `pad_color`.
        pad_color: a name, "#rrggbb" or three numbers in 0..255; None is black. Only for "pad".
        bit_depth: bits of a grey level in files that store more than 8; None takes the file's word. See
            `read_rgb`.

    Raises:
        ValueError: the folder is missing or has no images; its layout does not fit `class_cond`; a link leads
            out of `root`, to nothing or in a circle; an option is invalid; or, with buckets and "raise", an
            image header is damaged.
        OSError: the system fails to read a folder or, with buckets, a file.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int,
        class_cond: bool = True,
        random_flip: bool = False,
        on_corrupt: str = "raise",
        follow_links: bool = False,
        buckets: Sequence[Sequence[int]] | None = None,
        fit: str = "crop",
        pad_color: str | Sequence[int] | None = None,
        bit_depth: int | None = None,
    ) -> None:
        check_options(self, image_size=image_size, on_corrupt=on_corrupt, bit_depth=bit_depth)
        chosen = Fit(fit, pad_color)
        self.root = checked_folder(self, root)
        suffixes = readable_suffixes()
        # The root itself may be a link; only links below it are checked.
        listing = list_files(self.root, suffixes=suffixes, follow_links=follow_links)
        self.left_out: Mapping[str, int] = listing.left_out
        self.classes, labels = labels_of_folders(listing, suffixes, class_cond=class_cond, what="image")
        self.num_classes = len(self.classes)
        self.labels = torch.from_numpy(labels)
        super().__init__(
            listing.root,
            listing.names,
            stamps_of(listing.root, listing.names),
            source=str(self.root),
            image_size=image_size,
            random_flip=random_flip,
            on_corrupt=on_corrupt,
            buckets=buckets,
            fit=chosen,
            bit_depth=bit_depth,
        )

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "label" int; see `Images.image`."""
        image, index = self.image(index, generator)
        return {"image": image, "label": int(self.labels[index])}

    def identity(self) -> dict[str, str]:
        """Digests of names, classes, sizes and times, see `identify`."""
        return {**super().identity(), **identify(classes=self.classes)}


def check_options(dataset: object, *, image_size: int, on_corrupt: str, bit_depth: int | None) -> None:
    """Raises ValueError for an option that no dataset of images takes."""
    kind = type(dataset).__name__
    if image_size < 1:
        raise ValueError(f"{kind} needs image_size >= 1, got {image_size}")
    if on_corrupt not in ON_CORRUPT:
        raise ValueError(f"{kind} needs on_corrupt in {ON_CORRUPT}, got {on_corrupt!r}")
    if bit_depth is not None and bit_depth not in BIT_DEPTHS:
        raise ValueError(
            f"{kind} needs bit_depth in {BIT_DEPTHS.start}..{BIT_DEPTHS.stop - 1}, got {bit_depth}"
        )


def checked_folder(dataset: object, root: object) -> Path:
    """The folder with `~` expanded; raises ValueError if it is none."""
    kind = type(dataset).__name__
    if not isinstance(root, str | os.PathLike):
        raise ValueError(f"{kind} needs root to be a path, got {root!r}")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{kind} needs root to be a folder, got {folder}")
    return folder


def labels_of_folders(
    listing: Listing, suffixes: Sequence[str], *, class_cond: bool, what: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, and labels int64 (N,), of a folder in the ImageNet layout.

    Args:
        listing: its files.
        suffixes: those that were listed, for messages.
        class_cond: False gives no class names, and label 0 for each file.
        what: what a file is, such as "image".

    Raises:
        ValueError: there are no files, or the layout does not fit `class_cond`.
    """
    root = listing.root
    if not class_cond:
        if not len(listing.names):
            raise ValueError(f"found no {what}s below {root} (suffixes: {', '.join(suffixes)})")
        return (), np.zeros(len(listing.names), dtype=np.int64)
    if len(listing.names) and os.sep not in listing.names[0]:
        article = "an" if what[0] in "aeiou" else "a"
        raise ValueError(
            f"class_cond=True needs one folder per class below {root}, got {article} {what} directly in it: "
            f"{root / listing.names[0]}; class_cond=False uses {what}s at any depth, without labels"
        )
    classes = tuple(name for name in listing.folders if name and os.sep not in name)
    if not classes:
        raise ValueError(f"class_cond=True needs one folder per class below {root}, got no folder")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.array([numbers[name.partition(os.sep)[0]] for name in listing.names], dtype=np.int64)
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0)
    if len(empty):
        raise ValueError(
            f"the class folder {root / classes[empty[0]]} has no {what}s (suffixes: {', '.join(suffixes)})"
        )
    return classes, labels


DATASETS.register_module(name="ImageFolder", module=ImageFolder)
