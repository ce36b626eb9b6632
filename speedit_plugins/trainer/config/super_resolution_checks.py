"""Checks of `super_resolution`. Uses the standard library only, like `checks.py`."""

from typing import Any

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import SuperResolutionConfig
from speedit_plugins.trainer.config.validation import ConfigError


def check_super_resolution(config: ExperimentConfig, phase: str) -> None:
    """Checks the section, and the keys that go with it, against the other keys.

    Raises:
        ConfigError: the factor is 1 or does not divide a side, an option has no effect, or two keys exclude
            each other.
    """
    _check_sampling(config, phase)
    options = config.super_resolution
    if not options.factor:
        if options.augmentation != SuperResolutionConfig().augmentation:
            raise ConfigError(
                "super_resolution.augmentation", "has no effect without super_resolution.factor"
            )
        return
    if options.factor == 1:
        raise ConfigError("super_resolution.factor", "wanted int >= 2, or 0 for no super-resolution, got 1")
    if config.inpainting is not None:
        raise ConfigError("super_resolution", "a model fills holes or enlarges; wanted inpainting null")
    for key in ("dataset", "validation"):
        section = getattr(config.data, key) or {}
        if section.get("type") == "LatentCache":
            problem = "super_resolution makes its inputs of pixels; wanted a dataset of images or videos"
            raise ConfigError(f"data.{key}", f"{problem}, got LatentCache")
    if config.image_size % options.factor:
        problem = f"wanted a multiple of super_resolution.factor {options.factor}"
        raise ConfigError("image_size", f"{problem}, got {config.image_size}")


def _check_sampling(config: ExperimentConfig, phase: str) -> None:
    options, level = config.super_resolution, config.sampler.augmentation
    given: dict[str, Any] = {"low_resolution": config.low_resolution, "cascade": config.cascade}
    _check_stage_scores(config, phase)
    is_scored = phase == "test" and config.score_stages
    for key, value in given.items():
        if value and phase not in ("sample", "inference") and not (key == "cascade" and is_scored):
            wanted = "null" if key == "low_resolution" else "[]"
            wanted += ", or score_stages true" if key == "cascade" and phase == "test" else ""
            raise ConfigError(key, f"has no effect in {phase}; wanted {wanted}")
    for key, value in {"sampler.augmentation": level, **given}.items():
        if value and not options.factor:
            raise ConfigError(key, "has no effect without super_resolution.factor")
    if all(given.values()):
        raise ConfigError("low_resolution", "the stages of cascade draw what is enlarged; wanted null")
    if level > options.augmentation:
        most = f"super_resolution.augmentation {options.augmentation:g}, the largest level that is trained"
        raise ConfigError("sampler.augmentation", f"wanted at most {most}, got {level:g}")


def _check_stage_scores(config: ExperimentConfig, phase: str) -> None:
    if config.score_stages and phase not in ("inference", "test"):
        raise ConfigError("score_stages", f"has no effect in {phase}; wanted false")
    if config.score_stages and not config.cascade:
        raise ConfigError("score_stages", "has no effect without cascade; wanted false")
