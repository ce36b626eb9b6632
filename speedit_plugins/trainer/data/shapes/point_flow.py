"""ShapeNet's point clouds in the layout of PointFlow, which DiT-3D and most work on point clouds read.

Dims: S shapes, N points of a sample.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from speedit_plugins.registry import DATASETS, nearest
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.folder import checked_folder
from speedit_plugins.trainer.data.listing import Listing, facts_of, list_files, stamps_of
from speedit_plugins.trainer.data.shapes.files import read_cloud
from speedit_plugins.trainer.data.shapes.meshes import some_points
from speedit_plugins.trainer.data.shapes.normalization import Moments, Normalization
from speedit_plugins.trainer.data.strings import Strings

SPLITS = ("train", "val", "test")
# Points of a file, and how many of them, the first, are for training. The rest are for evaluation.
FILE_POINTS = 15_000
TRAIN_POINTS = 10_000
# WordNet's numbers of ShapeNet's categories, with PointFlow's names.
SYNSETS: Mapping[str, str] = {
    "airplane": "02691156", "bag": "02773838", "basket": "02801938", "bathtub": "02808440",
    "bed": "02818832", "bench": "02828884", "birdhouse": "02843684", "bookshelf": "02871439",
    "bottle": "02876657", "bowl": "02880940", "bus": "02924116", "cabinet": "02933112",
    "camera": "02942699", "can": "02747177", "cap": "02954340", "car": "02958343",
    "cellphone": "02992529", "chair": "03001627", "clock": "03046257", "dishwasher": "03207941",
    "earphone": "03261776", "faucet": "03325088", "file": "03337140", "guitar": "03467517",
    "helmet": "03513137", "jar": "03593526", "keyboard": "03085013", "knife": "03624134",
    "lamp": "03636649", "laptop": "03642806", "mailbox": "03710193", "microphone": "03759954",
    "microwave": "03761084", "monitor": "03211117", "motorcycle": "03790512", "mug": "03797390",
    "piano": "03928116", "pillow": "03938244", "pistol": "03948459", "pot": "03991062",
    "printer": "04004475", "remote_control": "04074963", "rifle": "04090263", "rocket": "04099429",
    "skateboard": "04225987", "sofa": "04256520", "speaker": "03691459", "stove": "04330267",
    "table": "04379243", "telephone": "04401088", "tin_can": "02946921", "tower": "04460130",
    "train": "04468005", "vessel": "04530566", "washer": "04554684",
}  # fmt: skip


class ShapeNetPointFlow:
    """Point clouds of ROOT/SYNSET/{train,val,test}/*.npy, float (15000, 3) each, as in ShapeNetCore.v2.PC15k.

    A sample of the split train is drawn from the first 10,000 points of a file, without repeats (DiT-3D draws
    with repeats). A sample of val or test is the first `num_points` of the last 5,000, always the same.

    Points are normalised with the mean and the spread of all points of the train split, for all splits: those
    of the chosen categories together, as in DiT-3D.

    Attributes: `classes` (names), `num_classes`, `labels`, `channels`, `normalization`.

    Source: Yang et al. 2019, arXiv:1906.12320; Mo et al. 2023, arXiv:2307.01831, and their loaders.

    Args:
        root: the folder of the synsets; may be a symbolic link.
        num_points: N, at most 10,000 for train and 5,000 for val and test.
        categories: names such as "airplane", or synsets such as "02691156"; their order gives the labels.
            None takes every folder of `root`, in the order of the synsets.
        split: "train", "val" or "test".
        class_cond: False for unconditional training: `num_classes` is 0, and every label too.
        mean: x, y and z to subtract; None reads the train split and measures it.
        std: what to divide by; None measures it.
        follow_links: True allows symbolic links that lead out of `root`.

    Raises:
        ValueError: a folder is missing or has no files, a file is damaged or of another shape, a category is
            unknown, or an option is out of range.
    """

    channels = 3

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: str | os.PathLike[str],
        *,
        num_points: int = 2048,
        categories: Sequence[str] | None = None,
        split: str = "train",
        class_cond: bool = True,
        mean: Sequence[float] | None = None,
        std: float | None = None,
        follow_links: bool = False,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"ShapeNetPointFlow needs split in {SPLITS}, got {split!r}")
        most = TRAIN_POINTS if split == "train" else FILE_POINTS - TRAIN_POINTS
        if not 1 <= num_points <= most:
            raise ValueError(f"ShapeNetPointFlow needs num_points in 1..{most} for {split}, got {num_points}")
        given = Normalization.given(mean, std)
        self.root = checked_folder(self, root)
        self.num_points, self.split = num_points, split
        listing = list_files(self.root, suffixes=(".npy",), follow_links=follow_links)
        self._listing = listing
        synsets = _found_synsets(listing) if categories is None else _known_synsets(categories)
        called = {synset: name for name, synset in SYNSETS.items()}
        classes = tuple(called.get(synset, synset) for synset in synsets)
        own = _files(listing, synsets, split)
        self._names = Strings([name for names in own for name in names])
        self._stamps = stamps_of(listing.root, self._names)
        self.classes = classes if class_cond else ()
        self.num_classes = len(self.classes)
        numbers = torch.arange(len(synsets)) * class_cond
        self.labels = numbers.repeat_interleave(torch.tensor([len(names) for names in own]))
        self.normalization = given or self._measured(synsets)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Path of the shape at `index`, relative to `root`."""
        return self._names[index]

    def identity(self) -> dict[str, str]:
        """Digests of names, classes, sizes and times, see `identify`."""
        stamps = self._stamps
        return identify(names=self._names, classes=self.classes, sizes=stamps.sizes, times=stamps.times)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "points" float32 (3, N), normalised, and "label" int. `generator` draws the points."""
        if not 0 <= index < len(self):
            raise IndexError(f"ShapeNetPointFlow has {len(self)} shapes, got index {index}")
        path = self._listing.root / self._names[index]
        whole = torch.from_numpy(_cloud(self._listing, self._names[index]).astype(np.float32))
        if self.split == "train":
            points = some_points(whole[:TRAIN_POINTS], self.num_points, generator, path)
        else:
            points = whole[TRAIN_POINTS : TRAIN_POINTS + self.num_points]
        return {"points": self.normalization.apply(points.T), "label": int(self.labels[index])}

    def _measured(self, synsets: Sequence[str]) -> Normalization:
        own = _files(self._listing, synsets, "train")
        names = Strings([name for names in own for name in names])
        moments = facts_of(
            self._listing.root,
            names,
            stamps_of(self._listing.root, names),
            what="shapes: moments of all points",
            read=lambda index: str(Moments.of(torch.from_numpy(_cloud(self._listing, names[index])))),
        )
        return Normalization.of(map(Moments.parse, moments))


def _cloud(listing: Listing, name: str) -> np.ndarray:
    points = read_cloud(listing.root / name)
    if len(points) != FILE_POINTS:
        raise ValueError(f"{listing.root / name} has {len(points)} points; wanted PointFlow's {FILE_POINTS}")
    return points


def _found_synsets(listing: Listing) -> list[str]:
    found = [name for name in listing.folders if name and os.sep not in name]
    if not found:
        raise ValueError(f"ShapeNetPointFlow needs a folder for each synset below {listing.root}, got none")
    return found


def _known_synsets(categories: Sequence[str]) -> list[str]:
    """The synsets of names or synsets, each once."""
    known = set(SYNSETS.values())
    for category in categories:
        if category not in SYNSETS and category not in known:
            raise ValueError(f"unknown category {category!r}{nearest(category, sorted(SYNSETS))}")
    synsets = [SYNSETS.get(category, category) for category in categories]
    if not synsets or len(set(synsets)) < len(synsets):
        raise ValueError(f"ShapeNetPointFlow needs different categories, got {list(categories)}")
    return synsets


def _files(listing: Listing, synsets: Sequence[str], split: str) -> list[list[str]]:
    """Names of the listed files of each synset in the split, in order.

    Raises:
        ValueError: a synset has none.
    """
    found: dict[str, list[str]] = {os.path.join(synset, split): [] for synset in synsets}
    for name in listing.names:
        folder = os.path.dirname(name)
        if folder in found:
            found[folder].append(name)
    for folder, names in found.items():
        if not names:
            raise ValueError(f"ShapeNetPointFlow found no .npy files in {listing.root / folder}")
    return list(found.values())


DATASETS.register_module(name="ShapeNetPointFlow", module=ShapeNetPointFlow)
