"""Videos from a folder: files or folders of frames, with classes or without.

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
from speedit_plugins.trainer.data.videos.clips import STILL_SUFFIXES, Clips, Cut, Entry
from speedit_plugins.trainer.data.videos.files import SUFFIXES as VIDEO_SUFFIXES

# How UCF101 names its files: v_ApplyEyeMakeup_g01_c01.avi.
CLASS_IN_NAME = re.compile(r"v_(.+)_g\d+_c\d+")


class VideoFolder(Clips):
    """Clips of the videos below `root`, by class name, then by path: see `Clips`.

    A video is a file, or a folder with numbered images and nothing else in it, a frame each. With classes
    there is one folder per class directly below `root`, with videos of any depth; or the videos lie in `root`
    itself under UCF101's names, v_CLASS_g01_c01.avi. Labels are in the order of the sorted class names.
    Without, every video at any depth counts and every label is 0.

    The frames of each file are counted at the start, which reads all of them.

    Attributes: `classes`, `labels`, `num_classes`, `channels`, `image_size`, `num_frames`, `buckets`.

    Args:
        root: the folder; may itself be a link.
        image_size: side of the square crop in pixels, >= 1.
        num_frames: F, >= 1.
        frame_interval: a clip takes each so many-th frame, >= 1.
        random_start: a clip begins anywhere it fits; False takes the first frames.
        class_cond: labels from the layout; False for an unconditional set.
        on_corrupt: "raise" names a video that is too short or damaged; "skip" warns of it and takes the next
            usable one, with that one's label.
        random_flip: mirror left to right with probability 1/2.
        follow_links: True allows symbolic links that lead out of `root`.
        buckets: [num_frames, height, width] of each; None crops to the square.

    Raises:
        ValueError: no such folder, no videos, a layout that does not fit, a link that leads out of `root`, to
            nothing or in a circle; see `Clips` for the rest.
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
    ) -> None:
        cut = Cut(num_frames, image_size, frame_interval, random_start, random_flip, buckets)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"VideoFolder needs a folder as root, got {self.root}, which is none")
        # Resolved once: a root that is a link stands for the folder it leads to.
        walk = Walk(
            self.root.resolve(), follow_links=follow_links, suffixes=(*VIDEO_SUFFIXES, *STILL_SUFFIXES)
        )
        named = list(_with_classes(walk) if class_cond else (("", e) for e in _videos(walk, str(walk.root))))
        if not named:
            raise ValueError(
                f"VideoFolder found no videos below {self.root} (suffixes: {', '.join(walk.suffixes)})"
            )
        super().__init__([entry for _, entry in named], cut, on_corrupt=on_corrupt)
        self.classes = tuple(sorted({name for name, _ in named})) if class_cond else ()
        self.num_classes = len(self.classes)
        numbers = {name: number for number, name in enumerate(self.classes)}
        self.labels = torch.tensor([numbers[name] if class_cond else 0 for name, _ in named])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "video" float32 (3, F, H, W) in [-1, 1] and "label" int.

        `generator` decides the start and the flip.

        Raises:
            ValueError: a damaged video, see `Clips.clip`.
            OSError: the system fails to read the file.
        """
        video, index = self.clip(index, generator)
        return {"video": video, "label": int(self.labels[index])}


def _with_classes(walk: Walk) -> Iterator[tuple[str, Entry]]:
    """Class name and video of each, sorted."""
    folders, files = walk.entries(str(walk.root))
    if folders and files:
        raise ValueError(
            f"class_cond=True needs one folder per class below {walk.root}, or files alone, got both:"
            f" {folders[0]} and {files[0]}"
        )
    if not folders and not files:
        raise ValueError(f"class_cond=True needs one folder per class below {walk.root}, got no folder")
    for file in files:
        found = CLASS_IN_NAME.fullmatch(Path(file).stem)
        if found is None:
            raise ValueError(
                f"class_cond=True needs one folder per class below {walk.root}, or names such as"
                f" v_CLASS_g01_c01.avi, got {file}; class_cond=False takes videos without labels"
            )
        yield found[1], Entry(file)
    for folder in folders:
        videos = list(_videos(walk, folder))
        if not videos or videos[0].path == folder:
            got = "frames directly in it" if videos else "nothing"
            raise ValueError(f"the class folder {folder} needs videos or folders of frames, got {got}")
        yield from ((os.path.basename(folder), video) for video in videos)


def _videos(walk: Walk, folder: str) -> Iterator[Entry]:
    """Videos in `folder` and below, depth first, sorted; the folder itself where it holds frames."""
    folders, files = walk.entries(folder)
    frames = [file for file in files if file.lower().endswith(STILL_SUFFIXES)]
    if frames:
        if len(frames) < len(files) or folders:
            other = next(path for path in (*folders, *files) if path not in frames)
            raise ValueError(f"a folder of frames needs images alone, got {frames[0]} and {other}")
        yield Entry(folder, num_frames=len(frames))
        return
    yield from map(Entry, files)
    for below in folders:
        yield from _videos(walk, below)


DATASETS.register_module(name="VideoFolder", module=VideoFolder)
