"""Videos from a folder: video files or folders of frames, with or without classes.

Dims: C = 3 colours, F frames, H x W pixels after the crop.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.folders import Walk
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.fit import Fit
from speedit_plugins.trainer.data.videos.clips import STILL_SUFFIXES, Clips, Cut, Entry
from speedit_plugins.trainer.data.videos.files import SUFFIXES as VIDEO_SUFFIXES

# File names of UCF101, such as v_ApplyEyeMakeup_g01_c01.avi.
CLASS_IN_NAME = re.compile(r"v_(.+)_g\d+_c\d+")


class VideoFolder(Clips):
    """Clips of the videos below `root`, sorted by class name and then by path; see `Clips`.

    A video is a file, or a folder that holds only numbered images, one per frame. With classes, the layout is
    one of two:

    - one folder per class directly below `root`; videos may be nested deeper inside;
    - all videos directly in `root`, with UCF101's names: v_CLASS_g01_c01.avi.

    Labels follow the sorted class names. Without classes, all videos at any depth are used and every label
    is 0. Creating the dataset reads all files once to count their frames. Hidden names (a leading dot) are
    skipped. Files with other suffixes are counted in `left_out`.

    Attributes: `classes`, `labels`, `num_classes`, `channels`, `image_size`, `num_frames`, `buckets`,
    `left_out` (number of files and videos that are not used, by suffix or reason), `num_corrupt`.

    Args:
        root: the folder; may be a symbolic link.
        image_size: side of the square crop in pixels, >= 1.
        num_frames: F, >= 1.
        frame_interval: a clip takes every frame_interval-th frame, >= 1.
        random_start: a clip starts at a random frame; False starts at the first one.
        class_cond: take labels from the layout; False for unconditional training.
        on_corrupt: what to do with a video that is too short or damaged. "raise" raises and names it. "skip"
            warns and uses the next usable video with its label instead.
        random_flip: mirror left to right with probability 1/2.
        follow_links: True allows symbolic links that lead out of `root`.
        buckets: [num_frames, height, width] of each bucket; None makes every video a square.
        fit: as in `ImageFolder`. A random crop is the same for all frames of a clip.
        pad_color: as in `ImageFolder`.

    Raises:
        ValueError: the folder is missing or has no videos; its layout does not fit; a link leads out of
            `root`, to nothing or in a circle; see `Clips` for more.
        OSError: the system fails to read a file.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: str | os.PathLike[str],
        *,
        image_size: int,
        num_frames: int,
        frame_interval: int = 1,
        random_start: bool = True,
        class_cond: bool = True,
        on_corrupt: str = "raise",
        random_flip: bool = False,
        follow_links: bool = False,
        buckets: Sequence[Sequence[int]] | None = None,
        fit: str = "crop",
        pad_color: str | Sequence[int] | None = None,
    ) -> None:
        fitted = Fit(fit, pad_color)
        cut = Cut(num_frames, image_size, frame_interval, random_start, random_flip, buckets, fitted)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"VideoFolder needs root to be a folder, got {self.root}")
        # The root itself may be a link; only links below it are checked.
        walk = Walk(
            self.root.resolve(), follow_links=follow_links, suffixes=(*VIDEO_SUFFIXES, *STILL_SUFFIXES)
        )
        named = list(_with_classes(walk) if class_cond else (("", e) for e in _videos(walk, str(walk.root))))
        if not named:
            raise ValueError(
                f"VideoFolder found no videos below {self.root} (suffixes: {', '.join(walk.suffixes)})"
            )
        super().__init__([entry for _, entry in named], cut, on_corrupt=on_corrupt, base=walk.root)
        self.left_out |= sorted(walk.left_out.items())
        self.classes = tuple(sorted({name for name, _ in named})) if class_cond else ()
        self.num_classes = len(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[name] if class_cond else 0 for name, _ in named])

    def identity(self) -> dict[str, str]:
        """Digests of names, classes, sizes and times, see `identify`."""
        return {**super().identity(), **identify(classes=self.classes)}

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "video" float32 (3, F, H, W) in [-1, 1] and "label" int.

        `generator` decides the first frame and the flip.

        Raises:
            ValueError: the video is damaged; see `Clips.clip`.
            OSError: the system fails to read the file.
        """
        video, index = self.clip(index, generator)
        return {"video": video, "label": int(self.labels[index])}


def _with_classes(walk: Walk) -> Iterator[tuple[str, Entry]]:
    """Yields (class name, video), sorted."""
    folders, files = walk.entries(str(walk.root))
    if folders and files:
        raise ValueError(
            f"class_cond=True needs either one folder per class below {walk.root} or only files, got both:"
            f" {folders[0]} and {files[0]}"
        )
    if not folders and not files:
        raise ValueError(f"class_cond=True needs one folder per class below {walk.root}, got no folder")
    for file in files:
        found = CLASS_IN_NAME.fullmatch(Path(file).stem)
        if found is None:
            raise ValueError(
                f"class_cond=True needs one folder per class below {walk.root}, or names such as"
                f" v_CLASS_g01_c01.avi, got {file}; class_cond=False uses videos without labels"
            )
        yield found[1], Entry(file)
    for folder in folders:
        videos = list(_videos(walk, folder))
        if not videos or videos[0].path == folder:
            got = "frames directly in it" if videos else "nothing"
            raise ValueError(f"the class folder {folder} needs video files or folders of frames, got {got}")
        yield from ((os.path.basename(folder), video) for video in videos)


def _videos(walk: Walk, folder: str) -> Iterator[Entry]:
    """Yields the videos in and below `folder`, sorted; a folder that holds frames is one video."""
    folders, files = walk.entries(folder)
    frames = [file for file in files if file.lower().endswith(STILL_SUFFIXES)]
    if frames:
        if len(frames) < len(files) or folders:
            other = next(path for path in (*folders, *files) if path not in frames)
            raise ValueError(f"a folder of frames may hold only images, got {frames[0]} and {other}")
        yield Entry(folder, num_frames=len(frames))
        return
    yield from map(Entry, files)
    for below in folders:
        yield from _videos(walk, below)


DATASETS.register_module(name="VideoFolder", module=VideoFolder)
