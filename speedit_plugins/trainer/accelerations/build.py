"""Builds what the config wants beside the timesteps."""

from functools import partial
from typing import Any

import torch
from torch import nn

from speedit_plugins.trainer.accelerations.alignment import FeatureAlignment, build_head, build_projector
from speedit_plugins.trainer.accelerations.contrastive import ContrastiveFlow
from speedit_plugins.trainer.accelerations.masking import build_masking
from speedit_plugins.trainer.accelerations.noise_assignment import NoiseAssignment
from speedit_plugins.trainer.accelerations.objective import Acceleration
from speedit_plugins.trainer.accelerations.self_alignment import SelfAlignment
from speedit_plugins.trainer.accelerations.teachers import CachedTeacher, Teacher
from speedit_plugins.trainer.accelerations.uncertainty import LearnedUncertainty
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.config.accelerations import AlignmentConfig
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.interface import token_blocks, token_width
from speedit_plugins.trainer.models.routing import set_route
from speedit_plugins.trainer.models.text_conditioned.routed import Routed
from speedit_plugins.trainer.parallel.replica import AUTOCAST

# The inner width of REPA's projector. Source: the release sihyun-yu/REPA, models/sit.py.
PROJECTOR_WIDTH = 2048


def build_accelerations(
    config: ExperimentConfig,
    model: nn.Module,
    process: Process,
    teacher: Teacher | CachedTeacher | None = None,
) -> tuple[Acceleration, ...]:
    """The accelerations of a config, in the order in which they change the losses.

    Call it before the engine is built: an acceleration may give the model layers or a route of its own.

    Args:
        model: on its device.
        process: of the training.
        teacher: what `build_teacher` gave, if the config wants one.

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
    if config.alignment.type != "none":
        found.append(_alignment(config, model, process, teacher))
    return tuple(found)


def _alignment(
    config: ExperimentConfig, model: nn.Module, process: Process, teacher: Teacher | CachedTeacher | None
) -> Acceleration:
    """The alignment of a config.

    Raises:
        ValueError: the model gives no tokens, or has no such block.
    """
    options = config.alignment
    _check_blocks(config, len(token_blocks(model)))
    _check_route(config, model)
    device, dtype = next(model.parameters()).device, AUTOCAST[config.precision]
    given: dict[str, Any] = {
        "layer": options.layer,
        "weight": options.weight,
        "until": options.until,
        "autocast": partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32),
    }
    width = token_width(model)
    if options.type == "REPA":
        assert teacher is not None
        projector = build_projector(width, options.projector_width or PROJECTOR_WIDTH, teacher.width)
        return FeatureAlignment(model, projector.to(device), teacher=teacher, **given)
    head = build_head(width, options.projector_width or 2 * width)
    return SelfAlignment(
        model,
        head.to(device),
        process=process,
        teacher_layer=options.last_block,
        max_interval=options.max_interval,
        decay=options.decay,
        **given,
    )


def _check_blocks(config: ExperimentConfig, depth: int) -> None:
    """Raises ValueError if a model with so many blocks has not those that are aligned."""
    options = config.alignment
    if not depth:
        raise ValueError(
            f"alignment.type: the model {config.model['type']} gives no tokens of its blocks; wanted DiT,"
            " Latte, PixArt or LatteT2V, or one whose forward takes hidden_after"
        )
    if options.layer > depth:
        unset = ", the default" if options.layer == AlignmentConfig().layer else ""
        raise ValueError(
            f"alignment.layer: wanted a block of the model's {depth}, got {options.layer}{unset}"
        )
    if options.last_block > depth:
        twice = f", twice alignment.layer {options.layer}" if options.teacher_layer is None else ""
        fitting = f"one after alignment.layer, up to {depth}"
        if options.layer == depth:
            fitting = f"alignment.layer before the last, and this one after it, up to {depth}"
        raise ValueError(
            f"alignment.teacher_layer: wanted a block of the model's {depth}, got"
            f" {options.last_block}{twice}; wanted {fitting}"
        )


def _check_route(config: ExperimentConfig, model: nn.Module) -> None:
    """Raises ValueError if the aligned block sees a part of the tokens, and the model has no others there."""
    if not isinstance(model, Routed) or model.route is None:
        return
    first, last = model.route.first, model.route.last
    if first <= config.alignment.layer <= last:
        raise ValueError(
            f"alignment.layer: after block {config.alignment.layer} of {config.model['type']} some tokens"
            f" are on the way past blocks {first} to {last}; wanted a block outside of the routing"
        )
