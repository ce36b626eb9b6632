"""Checks that the keys of 3D shapes, voxels or point clouds, agree with the others."""

from dataclasses import fields

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import ConfigError


def check_shape_keys(config: ExperimentConfig) -> None:
    """Checks `voxel_size`, `num_points` and what has no effect, or no meaning, beside them.

    Raises:
        ConfigError: two keys contradict, or an option has no effect.
    """
    if not config.voxel_size:
        if config.num_points:
            problem = f"needs voxel_size, the side of its cube, beside {config.num_points} points, got 0"
            raise ConfigError("num_points", problem)
        return
    defaults = {entry.name: entry.default for entry in fields(ExperimentConfig)}
    if config.image_size != defaults["image_size"]:
        problem = f"has no effect with voxel_size {config.voxel_size}; wanted none, got {config.image_size}"
        raise ConfigError("image_size", problem)
    what = f"with voxel_size {config.voxel_size}"
    if config.num_frames:
        raise ConfigError("num_frames", f"is of videos; wanted 0 {what}, got {config.num_frames}")
    if config.inpainting is not None:
        raise ConfigError("inpainting", f"fills images; wanted null {what}")
    if config.alignment.type == "REPA":
        raise ConfigError("alignment.type", f"a teacher of REPA sees images; wanted another {what}")
    if config.num_points and config.sampler.clip_sample:
        problem = "is for values in [-1, 1], which normalised points are not; wanted false with num_points"
        raise ConfigError("sampler.clip_sample", problem)
