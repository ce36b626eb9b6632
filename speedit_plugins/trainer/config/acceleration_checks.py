"""Checks of the sections in `accelerations.py`: what they need, and what they cannot be combined with."""

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
