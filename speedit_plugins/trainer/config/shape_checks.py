"""Checks that the keys of 3D shapes, voxels or point clouds, agree with the others."""

from dataclasses import fields

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import ConfigError


def check_shape_keys(config: ExperimentConfig) -> None:
    """Checks `voxel_size`, `num_points` and what has no effect, or no meaning, beside them.

    Raises:
        ConfigError: two keys contradict, or an option has no effect.
    """
    if config.voxel_size:
        _check_others(config)
    elif config.num_points:
        problem = f"needs voxel_size, the side of its cube, beside {config.num_points} points, got 0"
        raise ConfigError("num_points", problem)


def _check_others(config: ExperimentConfig) -> None:
    size = next(entry.default for entry in fields(ExperimentConfig) if entry.name == "image_size")
    what = f"with voxel_size {config.voxel_size}"
    clipped = "is for values in [-1, 1], which normalised points are not; wanted false with num_points"
    problems = (
        ("image_size", config.image_size != size, f"has no effect {what}; wanted none"),
        ("num_frames", config.num_frames, f"is of videos; wanted 0 {what}"),
        ("super_resolution.factor", config.super_resolution.factor, f"enlarges images; wanted 0 {what}"),
        ("alignment.type", config.alignment.type == "REPA", f"a teacher sees images; wanted none {what}"),
        ("evaluate_every", config.evaluate_every, f"measures images; wanted 0 {what}: test measures shapes"),
        ("sampler.clip_sample", config.num_points and config.sampler.clip_sample, clipped),
    )
    for key, is_wrong, problem in problems:
        if is_wrong:
            raise ConfigError(key, problem)
