"""What is written of drawn shapes, and what a checkpoint tells about them.

Dims: B shapes, C channels, D x H x W voxels, N points.
"""

import json
from pathlib import Path

import numpy as np
from torch import Tensor

from speedit_plugins.trainer import checkpoint
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.layouts import POINTS, layout_of
from speedit_plugins.trainer.logging.shapes import save_obj, save_ply
from speedit_plugins.trainer.terminal import say


def suffix_of(config: ExperimentConfig) -> str:
    """Suffix of the file of a drawn shape: .ply of a cloud, .npy of voxels."""
    return ".ply" if layout_of(config) == POINTS else ".npy"


def save_shape(sample: Tensor, path: Path) -> None:
    """Writes one shape as a file that `ShapeFolder` reads.

    Args:
        sample: finite points (3, N), or voxels (1, D, H, W), clamped to [-1, 1].
        path: ends in `suffix_of` the config. `.npy` holds shares in [0, 1], float32 (D, H, W).
    """
    if path.suffix == ".ply":
        save_ply(sample, path)
    else:
        share = (sample[0].clamp(-1, 1) + 1) / 2
        np.save(path, share.float().cpu().numpy(), allow_pickle=False)


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
    num_left_out = num_written = 0
    for number, sample in enumerate(samples):
        # The surface of a solid is where its voxels are 0.
        is_empty = not is_cloud and not bool((sample > 0).any())
        if is_empty or not bool(sample.isfinite().all()):
            num_left_out += 1
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
    if num_left_out:
        say(f"warning: {num_left_out} of {len(samples)} shapes are empty or not finite, and have no file")
    return num_written


def read_normalization(source: Path) -> Normalization | None:
    """How the data of a checkpoint scaled points, of its folder or of a file in it; None if it does not say.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = (source if source.is_dir() else source.parent) / checkpoint.NORMALIZATION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Normalization(tuple(map(float, found["mean"])), float(found["std"]))  # type: ignore[arg-type]  # its length is checked there
    except (ValueError, TypeError, KeyError) as error:
        raise checkpoint.CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
