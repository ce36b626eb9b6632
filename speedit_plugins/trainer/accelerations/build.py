"""Builds what the config wants beside the timesteps."""

from torch import nn

from speedit_plugins.trainer.accelerations.contrastive import ContrastiveFlow
from speedit_plugins.trainer.accelerations.masking import build_masking
from speedit_plugins.trainer.accelerations.noise_assignment import NoiseAssignment
from speedit_plugins.trainer.accelerations.objective import Acceleration
from speedit_plugins.trainer.accelerations.uncertainty import LearnedUncertainty
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.routing import set_route


def build_accelerations(
    config: ExperimentConfig, model: nn.Module, process: Process
) -> tuple[Acceleration, ...]:
    """The accelerations of a config, in the order in which they change the losses.

    Call it before the engine is built: an acceleration may give the model layers or a route of its own.

    Args:
        model: on its device.
        process: of the training.

    Raises:
        ValueError: the model cannot do what the config asks for.
    """
    found: list[Acceleration] = []
    if config.routing.keep < 1:
        set_route(model, config.routing.from_, config.routing.to, config.routing.keep)
    if config.noise_assignment is not None:
        found.append(NoiseAssignment(within_classes=config.noise_assignment == "class"))
    if config.contrastive.weight:
        found.append(ContrastiveFlow(process, weight=config.contrastive.weight))
    masking = build_masking(config.masking, model, process)
    if masking is not None:
        found.append(masking)
    # Before what adds a loss of another kind, which has a weight of its own.
    if config.uncertainty:
        found.append(LearnedUncertainty(model, process))
    return tuple(found)
