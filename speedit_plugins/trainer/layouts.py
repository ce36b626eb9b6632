"""Which kind of samples an experiment has, and whether its encoder, model and data agree on it.

The rank of a tensor does not tell: a video (C, F, H, W) has as many axes as a solid (C, D, H, W). So a batch
has its samples under the key of their layout, and the encoder states the layout that it takes.

Dims: `C` channels, `F` frames, `D`, `H`, `W` sides in voxels, `N` points.
"""

import inspect
from typing import Any

import torch

from speedit_plugins.registry import ENCODERS, MODELS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import SampleSource

IMAGES, VOXELS, POINTS = "image", "voxels", "points"
SHAPES = (VOXELS, POINTS)
# Encoders that change nothing, by the layout.
IDENTITIES = {IMAGES: "Pixels", VOXELS: "Voxels", POINTS: "Points"}


def layout_of(config: ExperimentConfig) -> str:
    """Key of the samples in a batch: image, which stands for videos too, voxels or points."""
    if not config.voxel_size:
        return IMAGES
    return POINTS if config.num_points else VOXELS


def plural(config: ExperimentConfig) -> str:
    """What samples are called in messages: images, videos or shapes."""
    if config.voxel_size:
        return "shapes"
    return "videos" if config.num_frames else "images"


def check_layout(config: ExperimentConfig) -> None:
    """Nothing, if encoder and model take samples of the config's layout.

    A model of shapes has an argument `num_points`; it is not built here.

    Raises:
        ValueError: one does not; the message has the keys, and what fits.
    """
    wanted, encoder, model = layout_of(config), str(config.encoder["type"]), str(config.model["type"])
    given = f"voxel_size {config.voxel_size} and num_points {config.num_points}"
    builder = MODELS.get(model)
    parameters = {} if builder is None else dict(inspect.signature(builder).parameters)
    is_known = builder is not None and all(p.kind is not p.VAR_KEYWORD for p in parameters.values())
    if is_known and "num_points" in parameters and not config.voxel_size:
        raise ValueError(f"the model {model} takes shapes, got voxel_size 0; wanted the side of its cube")
    if is_known and "num_points" not in parameters and config.voxel_size:
        raise ValueError(f"the model {model} takes no shapes, got {given}; wanted DiT3D, or voxel_size 0")
    taken = getattr(ENCODERS.get(encoder), "layout", IMAGES)
    if taken != wanted:
        raise ValueError(f"encoder {encoder} takes {taken}, got {given}; wanted encoder {IDENTITIES[wanted]}")


def check_first_shape(dataset: SampleSource, config: ExperimentConfig) -> None:
    """Nothing, if the first sample of the dataset is a shape as the config has them. Leaves images alone.

    Raises:
        ValueError: it has another layout or size, or values that are not finite.
    """
    wanted = layout_of(config)
    if wanted not in SHAPES:
        return
    sample: Any = dataset.load(0, torch.Generator().manual_seed(config.seed))
    if "latent_mean" in sample:
        return
    if wanted not in sample:
        found = ", ".join(sorted(sample))
        raise ValueError(f"data.dataset has samples of {found}, wanted {wanted}; see voxel_size, num_points")
    values = sample[wanted]
    size = (config.num_points,) if wanted == POINTS else (config.voxel_size,) * 3
    if values.ndim != 1 + len(size) or tuple(values.shape[1:]) != size:
        asked = ", ".join(map(str, size))
        raise ValueError(f"data.dataset has {wanted} of shape {tuple(values.shape)}, wanted (C, {asked})")
    if not bool(values.isfinite().all()):
        raise ValueError(f"data.dataset has {wanted} that are not finite in its first sample")
