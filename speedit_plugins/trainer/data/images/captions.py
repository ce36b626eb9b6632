"""Images with captions: from a file that lists them, or from a folder that holds both.

Dims: H x W pixels of a sample, N images.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify, portable
from speedit_plugins.trainer.data.images.caption_files import read_captions
from speedit_plugins.trainer.data.images.caption_folders import (
    NUM_NAMED,
    Captioned,
    CaptionOptions,
    read_folder,
)
from speedit_plugins.trainer.data.images.fit import Fit
from speedit_plugins.trainer.data.images.folder import Images, check_options, checked_folder
from speedit_plugins.trainer.data.listing import Stamps, stamps_of
from speedit_plugins.trainer.data.strings import Strings


class ImageCaptions(Images):
    """Images with captions. Pixels are read as in `ImageFolder`.

    With `captions_file`, the images are those that it lists, in its order:

    - .csv, .jsonl (one JSON object per line) or .parquet: "file_name" or "path", and "text" or "caption";
    - .json with "images" and "annotations", as in MS-COCO; an image may have several captions.

    With `root` alone, the folder is searched at any depth, and has one of two layouts:

    - Hugging Face's imagefolder: metadata.csv, metadata.jsonl or metadata.parquet in the folder or in
      folders below it. Paths are relative to the metadata file. Images that it does not list are left out;
    - a text file beside each image, as for kohya's scripts and OneTrainer: photo.png and photo.txt. It is
      read if there is no metadata file, or with `caption_suffix`.

    Other columns and keys are ignored. From 10,000 images on, what was found is kept as for `ImageFolder`;
    text files that changed are read again.

    Attributes: `channels`, `image_size`, `buckets`, `num_corrupt`, `max_captions`, `left_out` (number of
    files that are not used, by suffix or reason).

    Args:
        captions_file: a file in one of the layouts above; None searches `root`.
        image_size: side of the square sample in pixels, >= 1.
        root: folder that image paths are relative to; None uses the folder of the captions file. Absolute
            paths and those that begin with `~`, the home folder, do not depend on it.
        text_column: name of the column or key with the captions; None takes "text" or "caption".
        caption_suffix: suffix of the text files beside the images; None is ".txt". If given, metadata files
            are not read.
        caption_lines: what the lines of a text file are. "join" makes them one caption, "choose" takes each
            as a caption of its own; one of them is drawn per sample.
        missing_captions: what to do if text files are missing or empty. "raise" names the first ones. "empty"
            takes the empty caption.
        random_flip: mirror left to right with probability 1/2. Captions that mention left or right then
            become wrong for mirrored images.
        on_corrupt: as in `ImageFolder`; the image that replaces a damaged one keeps its own caption.
        follow_links: as in `ImageFolder`; for `root` alone.
        buckets: as in `ImageFolder`.
        fit: as in `ImageFolder`.
        pad_color: as in `ImageFolder`.
        bit_depth: as in `ImageFolder`.

    Raises:
        ValueError: a file or folder is missing; the captions file is empty or malformed, or a row has no path
            or text (the message names the line); images or captions are missing; a folder has splits such as
            train and test; an option is invalid or has no effect; or, with buckets, an image header is
            damaged.
        OSError: the system fails to read the captions or, with buckets, an image.
    """

    # There are too many captions to encode them all once and keep the features, as for embedded datasets.
    captions = None
    classes: tuple[str, ...] = ()
    num_classes = 0

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        captions_file: str | os.PathLike[str] | None = None,
        *,
        image_size: int,
        root: str | os.PathLike[str] | None = None,
        text_column: str | None = None,
        caption_suffix: str | None = None,
        caption_lines: str = "join",
        missing_captions: str = "raise",
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
        options = CaptionOptions(text_column, caption_suffix, caption_lines, missing_captions, follow_links)
        if captions_file is None:
            if root is None:
                raise ValueError("ImageCaptions needs captions_file or root, got neither")
            found = read_folder(checked_folder(self, root), options)
            source = str(found.base)
        else:
            file = Path(captions_file).expanduser()
            if file.is_dir():
                raise ValueError(f"captions_file must be a file, got the folder {file}; wanted root: {file}")
            options.check_file(file)
            base = checked_folder(self, file.parent if root is None else root)
            rows = [
                replace(row, path=os.path.expanduser(row.path)) for row in read_captions(file, text_column)
            ]
            found, source = Captioned(base, rows), str(file)
        self.root = found.base
        self.left_out: Mapping[str, int] = found.left_out
        names = Strings([os.path.expanduser(row.path) for row in found.rows])
        self._texts = _Texts(row.texts for row in found.rows)
        super().__init__(
            found.base,
            names,
            _existing(found, names, source),
            source=source,
            image_size=image_size,
            random_flip=random_flip,
            on_corrupt=on_corrupt,
            buckets=buckets,
            fit=chosen,
            bit_depth=bit_depth,
        )

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (3, H, W) in [-1, 1] and "caption" str; see `Images.image`.

        `generator` decides the image, then which caption if there are several.
        """
        sample = self.load_all(index, generator)
        texts = sample["captions"]
        # A single caption uses no random number.
        number = int(torch.randint(len(texts), (), generator=generator)) if len(texts) > 1 else 0
        return {"image": sample["image"], "caption": texts[number]}

    def load_all(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """Like `load`, but with all captions of the image: "captions", list of str."""
        image, index = self.image(index, generator)
        return {"image": image, "captions": self._texts.of(index)}

    def identity(self) -> dict[str, str]:
        """Digests of names, captions, sizes and times, see `identify`."""
        # A captions file may have absolute paths.
        names = portable(self._base, self._names)
        return {**super().identity(), **identify(names=names, captions=self._texts)}

    @property
    def max_captions(self) -> int:
        """Largest number of captions that one image has."""
        return self._texts.most


def _existing(found: Captioned, names: Strings, source: str) -> Stamps:
    """Sizes and times of the images.

    Raises:
        ValueError: some files are missing; the message names the first few.
    """
    stamps = stamps_of(found.base, names)
    if missing := stamps.missing():
        named = [f"{found.base / names[row]} ({found.rows[row].where})" for row in missing[:NUM_NAMED]]
        rest = ", ..." if len(missing) > NUM_NAMED else ""
        raise ValueError(
            f"{source}: {len(missing)} of {len(names)} images are missing: {', '.join(named)}{rest}"
        )
    return stamps


class _Texts:
    """The captions of N images; each image has one or more."""

    def __init__(self, groups: Iterable[Sequence[str]]) -> None:
        first: list[int] = [0]
        texts: list[str] = []
        for group in groups:
            texts += group
            first.append(len(texts))
        self._texts = Strings(texts)
        self._first = np.array(first, dtype=np.int64)  # index of each image's first caption
        self.most = int(np.diff(self._first).max())

    def of(self, index: int) -> list[str]:
        """The captions of one image."""
        return [self._texts[number] for number in range(self._first[index], self._first[index + 1])]

    def __len__(self) -> int:
        return len(self._first) - 1

    def digest(self, start: int, stop: int) -> bytes:
        """Hash of the captions of the images from `start` to before `stop`, 16 bytes."""
        first = self._first[start : stop + 1]
        counts = hashlib.blake2b(np.diff(first).astype("<i8").tobytes(), digest_size=16)
        counts.update(self._texts.digest(int(first[0]), int(first[-1])))
        return counts.digest()


DATASETS.register_module(name="ImageCaptions", module=ImageCaptions)
