"""Shapes from a folder, with or without classes, as points or voxels.

Axes as in `solid_digits`.

Dims: S shapes, N points, R the side of a grid.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.images.folder import checked_folder, labels_of_folders
from speedit_plugins.trainer.data.listing import facts_of, list_files, stamps_of
from speedit_plugins.trainer.data.shapes.files import SUFFIXES, read_points, read_voxels
from speedit_plugins.trainer.data.shapes.normalization import Moments, Normalization
from speedit_plugins.trainer.data.strings import Strings


class ShapeFolder:
    """Shapes below `root`, sorted by class name and then by path: points, or voxels where `num_points` is 0.

    With classes, there is one folder per class directly below `root`, as in `ImageFolder`. A file is one of:

    - `.npy` with points (M, 3), or for voxels (R, R, R), bools or shares in [0, 1];
    - a mesh, `.ply`, `.off` or `.obj`: points lie evenly on its surface, voxels fill it. Needs trimesh;
    - `.ply` without faces, for points.

    Creating the dataset reads every file once, so that a damaged one is named before the training. From
    10,000 files on, what was found is kept in `speedit/folders` in $XDG_CACHE_HOME or ~/.cache.

    Points are normalised with `normalization`, the mean and spread of all shapes, see `Normalization`.

    Attributes: `classes`, `num_classes`, `labels`, `channels`, `normalization` (None for voxels), `left_out`
    (number of files that are not read, by suffix).

    Args:
        root: the folder; may be a symbolic link.
        voxel_size: R. It has no effect on points.
        num_points: N, drawn anew for each load; 0 gives voxels.
        class_cond: take labels from folder names; False for unconditional training.
        fit_box: centre the box around each shape, and scale its longest side to 2. False keeps the file's
            units, and with them the sizes of shapes relative to each other. A mesh's voxels always fit.
        mean: x, y and z to subtract, in the units after `fit_box`; None measures it.
        std: what to divide by; None measures it. Give the values of the training's data to a part held out.
        follow_links: True allows symbolic links that lead out of `root`.

    Raises:
        ValueError: the folder is missing or has no shapes, its layout does not fit, a file is damaged, or an
            option is invalid or has no effect.
        ImportError: there are meshes, and trimesh is missing.
    """

    def __init__(  # noqa: PLR0913 - flat, as the keys of a config are
        self,
        root: str | os.PathLike[str],
        *,
        voxel_size: int = 0,
        num_points: int = 0,
        class_cond: bool = True,
        fit_box: bool = True,
        mean: Sequence[float] | None = None,
        std: float | None = None,
        follow_links: bool = False,
    ) -> None:
        if num_points < 0 or voxel_size < 0 or not (num_points or voxel_size):
            raise ValueError(
                "ShapeFolder needs num_points >= 1 for points, or voxel_size >= 1 for voxels, got"
                f" {num_points} and {voxel_size}"
            )
        given = Normalization.given(mean, std)
        if not num_points and (given is not None or not fit_box):
            raise ValueError("mean, std and fit_box: false have no effect on voxels; wanted num_points >= 1")
        self.root = checked_folder(self, root)
        self.voxel_size, self.num_points, self.fit_box = voxel_size, num_points, fit_box
        listing = list_files(self.root, suffixes=SUFFIXES, follow_links=follow_links)
        self.left_out: Mapping[str, int] = listing.left_out
        self.classes, labels = labels_of_folders(listing, SUFFIXES, class_cond=class_cond, what="shape")
        self.labels, self.num_classes = torch.from_numpy(labels), len(self.classes)
        self.channels = 3 if num_points else 1
        self._base, self._names = listing.root, listing.names
        self._stamps = stamps_of(listing.root, listing.names)
        self.normalization = self._checked(given)

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
        """One sample: "points" float32 (3, N), or "voxels" float32 (1, R, R, R) in [-1, 1]; and "label" int.

        `generator` draws the points.

        Raises:
            ValueError: the file was damaged since the dataset was created. Then a mesh in text that
                was cut is noticed only if the parser fails on the rest.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"ShapeFolder has {len(self)} shapes, got index {index}")
        label = int(self.labels[index])
        if self.normalization is None:
            voxels = read_voxels(self._base / self._names[index], self.voxel_size, is_whole=True)
            return {"voxels": voxels, "label": label}
        points = self._points(index, generator, is_whole=True)
        return {"points": self.normalization.apply(points), "label": label}

    def _points(self, index: int, generator: torch.Generator, *, is_whole: bool = False) -> Tensor:
        """Points (3, N) before the normalization."""
        path = self._base / self._names[index]
        return read_points(path, self.num_points, generator, fit_box=self.fit_box, is_whole=is_whole).T

    def _checked(self, given: Normalization | None) -> Normalization | None:
        """The normalization, after a look at every file."""
        if not self.num_points:
            self._look(f"voxels {self.voxel_size}", self._full_voxels)
            return None
        drawn = f"{self.num_points} points, {'in boxes' if self.fit_box else 'as they are'}"
        moments = self._look(f"moments of {drawn}", self._moments)
        try:
            return given or Normalization.of(map(Moments.parse, moments))
        except ValueError as error:
            where = f"{self.root} with {self._names[0]}"
            raise ValueError(f"{where}: {error}; wanted fit_box true, or points nearer to 0") from error

    def _look(self, what: str, read: Callable[[int], str]) -> Strings:
        return facts_of(self._base, self._names, self._stamps, what=f"shapes: {what}", read=read)

    def _full_voxels(self, index: int) -> str:
        return str(float(read_voxels(self._base / self._names[index], self.voxel_size).sum()))

    def _moments(self, index: int) -> str:
        return str(Moments.of(self._points(index, torch.Generator().manual_seed(index)).T))


DATASETS.register_module(name="ShapeFolder", module=ShapeFolder)
