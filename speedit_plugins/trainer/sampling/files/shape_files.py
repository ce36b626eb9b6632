"""What is written of drawn shapes, and what a checkpoint tells about them.

Dims: B shapes, C channels, D x H x W voxels, N points.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.shapes import meshes
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.layouts import POINTS, layout_of
from speedit_plugins.trainer.logging.shapes import save_obj, save_ply
from speedit_plugins.trainer.terminal import say

SUFFIX = ".npy"
"""Of a drawn shape's file: what needs no package to read, and `ShapeFolder` reads."""


def save_shape(sample: Tensor, path: Path) -> None:
    """Writes one finite shape as `.npy`, float32, whole or not at all.

    Args:
        sample: points (3, N), written as (N, 3), or voxels (1, D, H, W), clamped to [-1, 1] and written as
            shares in [0, 1], (D, H, W).
        path: the file.

    Raises:
        OSError: the file cannot be written; names it.
    """
    values = sample.T if sample.ndim == 2 else (sample[0].clamp(-1, 1) + 1) / 2
    content = io.BytesIO()
    np.save(content, values.float().cpu().contiguous().numpy(), allow_pickle=False)
    # One of very many files, as in `images.save`.
    write_whole(path, content.getvalue(), is_flushed=False)


def read_shapes(folder: Path) -> Tensor:
    """The shapes that `save_shape` wrote to a folder, by name: (B, 3, N) or (B, 1, D, H, W).

    Raises:
        ValueError: there are none, one cannot be read, or their shapes differ.
    """
    found: list[Tensor] = []
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            values = torch.from_numpy(np.load(path, allow_pickle=False)).float()
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read the shape {path}: {error}") from error
        shape = values.T if values.ndim == 2 else (values * 2 - 1).unsqueeze(0)
        if values.ndim not in (2, 3) or (found and shape.shape != found[0].shape):
            raise ValueError(f"{path} has an array {tuple(values.shape)}, unlike the others of {folder}")
        found.append(shape)
    if not found:
        others = sorted({path.suffix for path in folder.glob("*.*") if path.suffix in meshes.SUFFIXES})
        also = f", only {' and '.join(others)}; wanted a folder that inference wrote" if others else ""
        raise ValueError(f"no shapes, {SUFFIX} files, in {folder}{also}")
    return torch.stack(found)


def save_models(samples: Tensor, folder: Path, config: ExperimentConfig) -> int:
    """Writes each finite shape for other programs: clouds as `.ply`, voxels as a mesh, `.obj`.

    Lines say which shapes have no file: those that are not finite, and empty solids.

    Args:
        samples: (B, 3, N), or (B, 1, D, H, W).
        folder: gets 000000.ply and so on. It is made if there is a file for it.
        config: of the shapes.

    Returns:
        Number of files.
    """
    is_cloud = layout_of(config) == POINTS
    write, suffix = (save_ply, ".ply") if is_cloud else (save_obj, ".obj")
    num_empty = num_broken = num_written = 0
    for number, sample in enumerate(samples):
        # The surface of a solid is where its voxels are 0.
        is_finite = bool(sample.isfinite().all())
        is_empty = is_finite and not is_cloud and not bool((sample > 0).any())
        num_empty, num_broken = num_empty + is_empty, num_broken + (not is_finite)
        if is_empty or not is_finite:
            continue
        try:
            # A mesh is made before anything is written.
            folder.mkdir(parents=True, exist_ok=True)
            write(sample, folder / f"{number:06d}{suffix}")
        except ImportError as error:
            if not any(folder.iterdir()):
                folder.rmdir()
            say(f"warning: no meshes are written: {error}")
            return num_written
        num_written += 1
    if num_empty:
        say(f"warning: {num_empty} of {len(samples)} drawn solids are empty: a blank picture, and no file")
    if num_broken:
        say(f"warning: {num_broken} of {len(samples)} drawn shapes are not finite: a cross, and no file")
    return num_written


def read_normalization(source: Path) -> Normalization | None:
    """How the data of a checkpoint scaled points, of its folder or of a file in it; None if it does not say.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = (source if source.is_dir() else source.parent) / checkpoints.NORMALIZATION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Normalization(tuple(map(float, found["mean"])), float(found["std"]))  # type: ignore[arg-type]  # its length is checked there
    except (ValueError, TypeError, KeyError) as error:
        raise checkpoints.CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
