"""How samples of each kind are written: one by one, as a grid, and what was given of one with a hole.

Dims: B samples, C channels, F frames (absent for images), H x W pixels; R the side of a solid, N points.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.logging.rendering import OUTSIDE, distances_from_data
from speedit_plugins.trainer.logging.shapes import save_shapes
from speedit_plugins.trainer.sampling.files.shape_files import SUFFIX, save_shape
from speedit_plugins.trainer.terminal import say


def suffix_of(config: ExperimentConfig) -> str:
    """Suffix of the file of a sample."""
    if config.voxel_size:
        return SUFFIX
    return ".mp4" if config.num_frames else ".png"


def saved_form(samples: Tensor, config: ExperimentConfig) -> Any:
    """What `save_sample` takes: images and videos (B, C, [F,] H, W) as uint8 (B, [F,] H, W, C), or shapes."""
    return samples.cpu() if config.voxel_size else images.to_uint8(samples)


def save_sample(sample: Any, stem: Path, config: ExperimentConfig) -> None:
    """Writes one sample in its saved form as `stem` with its suffix.

    Raises:
        OSError: the file cannot be written; names it.
    """
    if config.voxel_size:
        save_shape(sample, stem.with_suffix(suffix_of(config)))
    else:
        images.save(sample, stem, frames_per_second=config.frames_per_second)


def save_known(sample: Any, mask: Tensor, stem: Path, config: ExperimentConfig) -> None:
    """Writes what was given of a sample: a PNG that is transparent in the hole, or voxels that are NaN there.

    A video is one PNG with its frames from left to right.

    Args:
        sample: in its saved form.
        mask: bool, (H, W), (F, H, W) or (R, R, R): the hole.
        stem: path without its suffix.
        config: of the samples.

    Raises:
        OSError: the file cannot be written; names it.
    """
    if config.voxel_size:
        save_shape(sample.masked_fill(mask, torch.nan), stem.with_suffix(SUFFIX))
        return
    hole = mask.numpy()
    if sample.ndim == 4:
        sample, hole = np.concatenate(list(sample), axis=1), np.concatenate(list(hole), axis=1)
    images.save_with_hole(sample, hole, stem.with_suffix(".png"))


def save_cells(
    samples: Tensor,
    path: Path,
    config: ExperimentConfig,
    *,
    columns: int,
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    normalization: Normalization | None = None,
) -> None:
    """Writes samples (B, C, [F,] H, W), or shapes, as a PNG, row by row.

    For videos the PNG shows frames from left to right. An MP4 and a GIF of the grid are written beside it.
    Shapes are shown from several sides, and the GIF turns them.

    Args:
        samples: on the CPU.
        path: the PNG's; its folder is made.
        config: of the samples.
        columns: samples in a row.
        titles: written above the columns.
        row_titles: of images and videos, written before the rows.
        normalization: of the data of clouds; gives their scale.

    Raises:
        OSError: a file cannot be written; names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.voxel_size:
        save_shapes(samples, path, columns=columns, titles=titles, normalization=normalization)
        if normalization is not None:
            _say_what_is_outside(samples, normalization)
    elif config.num_frames:
        rate = config.frames_per_second
        images.save_videos(
            samples, path, columns=columns, titles=titles, row_titles=row_titles, frames_per_second=rate
        )
    else:
        images.save_grid(samples, path, columns=columns, titles=titles, row_titles=row_titles)


def _say_what_is_outside(clouds: Tensor, normalization: Normalization) -> None:
    """A line if clouds (B, 3, N) are mostly beyond the edges of their pictures."""
    finite = clouds[clouds.isfinite().flatten(1).all(dim=1)]
    far = distances_from_data(finite, normalization)
    if num_outside := int((far > OUTSIDE).sum()):
        say(
            f"warning: {num_outside} of {len(clouds)} clouds are mostly outside of their pictures. These have"
            f" the scale of the data. The middle point of the farthest is {float(far.max()):.3g} standard"
            " deviations of the data from its mean"
        )
