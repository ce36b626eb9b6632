"""Builds what the config wants beside the timesteps."""

from torch import nn

from speedit_plugins.trainer.accelerations.contrastive import ContrastiveFlow
from speedit_plugins.trainer.accelerations.masking import build_masking
from speedit_plugins.trainer.accelerations.objective import Acceleration
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.config.schema import ExperimentConfig


def build_accelerations(
    config: ExperimentConfig, model: nn.Module, process: Process
) -> tuple[Acceleration, ...]:
    """The accelerations of a config, in the order in which they change the losses.

    Call it before the engine is built: an acceleration may give the model layers of its own.

    Args:
        model: on its device.
        process: of the training.

    Raises:
        ValueError: the model does not have what an acceleration needs.
    """
    found: list[Acceleration] = []
    if config.contrastive.weight:
        found.append(ContrastiveFlow(process, weight=config.contrastive.weight))
    masking = build_masking(config.masking, model, process)
    if masking is not None:
        found.append(masking)
    return tuple(found)
