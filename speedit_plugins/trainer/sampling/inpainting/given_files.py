"""A sample and its hole that a user gives as files, for an inpainting model to fill.

Dims: C channels, F frames (absent for images), H x W pixels; R the side of a solid.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.images.fit import center_crop
from speedit_plugins.trainer.data.images.pixels import read_rgb
from speedit_plugins.trainer.data.shapes.files import read_voxels

# A mask has a hole where its grey level is above this, so that white is a hole in a compressed video too.
_GREY = 127


def read_given(config: ExperimentConfig, *, channels: int) -> tuple[Tensor, Tensor]:
    """The sample of `inpaint_image` and the hole of `inpaint_mask`, as the model's samples are.

    Args:
        config: has both.
        channels: C.

    Returns:
        The sample (1, C, [F,] H, W) in [-1, 1], and its mask (1, 1, [F,] H, W), 1 in the hole.

    Raises:
        ValueError: a file cannot be read, their sizes differ, a video is too short, or there is no hole.
    """
    assert config.inpaint_image is not None
    assert config.inpaint_mask is not None
    paths = Path(config.inpaint_image), Path(config.inpaint_mask)
    for path in paths:
        if not path.is_file():
            raise ValueError(f"inpainting needs a file, got {path}, which is none")
    if config.voxel_size:
        sample, hole = _solids(*paths, size=config.voxel_size)
    else:
        sample, hole = _frames(*paths, config, channels=channels)
        if not config.num_frames:
            sample, hole = sample[:, 0], hole[0]
    if not hole.any():
        wanted = "voxels above 1/2" if config.voxel_size else "white pixels"
        raise ValueError(f"inpaint_mask needs {wanted} in the hole, got none in {config.inpaint_mask}")
    return sample.unsqueeze(0), hole.float()[None, None]


def _solids(path: Path, mask_path: Path, *, size: int) -> tuple[Tensor, Tensor]:
    """A solid (1, R, R, R), and bool (R, R, R)."""
    if mask_path.suffix != ".npy":
        # A mesh would be scaled to fill the cube.
        raise ValueError(f"inpaint_mask needs voxels in an .npy, 1 in the hole, got {mask_path}")
    return read_voxels(path, size), read_voxels(mask_path, size)[0] > 0


def _frames(path: Path, mask_path: Path, config: ExperimentConfig, *, channels: int) -> tuple[Tensor, Tensor]:
    """Frames (C, F, H, W), of an image one, and bool (F, H, W). An image as mask is that of all frames."""
    number, edge = config.num_frames, config.image_size
    frames = _video(path, number, "inpaint_image") if number else [read_rgb(path)]
    is_moving = bool(number) and _is_video(mask_path)
    masks = _video(mask_path, number, "inpaint_mask") if is_moving else [read_rgb(mask_path)] * len(frames)
    if frames[0].size != masks[0].size:
        raise ValueError(
            f"inpaint_mask needs the size of the image, {frames[0].size[0]} x {frames[0].size[1]}, got"
            f" {masks[0].size[0]} x {masks[0].size[1]}"
        )
    mode = "L" if channels == 1 else "RGB"
    pixels = np.stack([np.asarray(center_crop(frame.convert(mode), edge, edge)) for frame in frames])
    scaled = torch.from_numpy(pixels.astype(np.float32).reshape(len(frames), edge, edge, -1) / 127.5 - 1.0)
    holes = np.stack([np.asarray(center_crop(mask.convert("L"), edge, edge)) > _GREY for mask in masks])
    return scaled.movedim(-1, 0), torch.from_numpy(holes)


def _video(path: Path, num_frames: int, key: str) -> list[Image.Image]:
    """The first frames of a video file."""
    # Here, because only videos need PyAV.
    from speedit_plugins.trainer.data.videos.files import read_frames, read_header

    if not _is_video(path):
        raise ValueError(f"{key} needs a video file with num_frames {num_frames}, got {path}")
    found = read_header(path).num_frames
    if found < num_frames:
        hint = "; a GIF drops repeated frames, an MP4 keeps them" if path.suffix.lower() == ".gif" else ""
        raise ValueError(f"{key} needs num_frames {num_frames} frames or more, got {found} in {path}{hint}")
    return read_frames(path, range(num_frames), num_frames=found)


def _is_video(path: Path) -> bool:
    from speedit_plugins.trainer.data.videos.files import SUFFIXES

    return path.suffix.lower() in SUFFIXES
