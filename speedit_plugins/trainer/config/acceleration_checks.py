"""Checks of the sections in `accelerations.py`: what they need, and what they cannot be combined with."""

from speedit_plugins.trainer.config.accelerations import MaskingConfig
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import ConfigError


def check_accelerations(config: ExperimentConfig) -> None:
    """Checks the accelerations of a training.

    Raises:
        ConfigError: names the key that is missing, or that cannot be combined with another one.
    """
    if config.contrastive.weight and config.data.batch_size < 2:
        raise ConfigError(
            "contrastive.weight",
            f"needs two samples in a batch, got data.batch_size {config.data.batch_size}",
        )
    _check_masking(config)


def _check_masking(config: ExperimentConfig) -> None:
    options, defaults = config.masking, MaskingConfig()
    if options.type == "none":
        for key in ("ratio", "spread"):
            if getattr(options, key) != getattr(defaults, key):
                raise ConfigError(f"masking.{key}", "has no effect with masking.type none; wanted type MDT")
        return
    if options.ratio + (options.spread or 0) >= 1:
        raise ConfigError(
            "masking.spread",
            f"wanted ratio + spread < 1, so that tokens are left, got {options.ratio:g} + {options.spread:g}",
        )
    if config.plugin == "gemini":
        raise ConfigError(
            "masking.type",
            "makes two forward passes for a backward pass, which is not tested with plugin gemini; wanted"
            " ddp, zero1 or zero2",
        )
