"""Weightings as functions of time, from trainers of rectified flows.

Dims: T timesteps.
"""

import math

import torch
from torch import Tensor

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.conversion import defined_on
from speedit_plugins.registry import WEIGHTINGS


@defined_on("flow")
def sigma_sqrt(schedule: NoiseSchedule) -> Tensor:
    """Weight s^-2 on the loss of a flow, s the time on the straight path, shape (T,). There is no root in it.

    It spans many orders of magnitude, so use it with `normalize`. On other schedules s is sigma / (alpha +
    sigma), the time at which the straight path has the same SNR.
    Source: the weighting scheme of this name in diffusers and kohya. Diffusers' scripts for Stable Diffusion
    3 put it by default on the loss of x0, where it is weight 1 on the loss of the flow.

    Example:
        >>> sigma_sqrt(NoiseSchedule.rectified_flow(2)).round(decimals=4).tolist()  # s = 1/4 and 3/4
        [16.0, 1.7778]
    """
    return _straight_time(schedule) ** -2


@defined_on("flow")
def cosmap(schedule: NoiseSchedule) -> Tensor:
    """Weight 2 / (pi (1 - 2s + 2s^2)) on the loss of a flow, s the time on the straight path, shape (T,).

    With uniform draws it has the objective of the density `cosmap` with weight 1. On other schedules s is
    sigma / (alpha + sigma). Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.

    Example:
        >>> cosmap(NoiseSchedule.rectified_flow(2)).round(decimals=4).tolist()  # s = 1/4 and 3/4
        [1.0186, 1.0186]
    """
    s = _straight_time(schedule)
    return 2 / (math.pi * (1 - 2 * s + 2 * s**2))


def bell(schedule: NoiseSchedule) -> Tensor:
    """Weight exp(-2 (u - 1/2)^2) less its value at both ends, with mean 1, shape (T,).

    It multiplies the host's own loss, whatever it predicts.
    Source: the training weight of DiffSynth-Studio and ai-toolkit. Those take u at the bins' edges, so one
    timestep in a thousand has weight 0 there. DiffSynth-Studio reads it at shifted times.

    Example:
        >>> bell(NoiseSchedule.rectified_flow(3)).round(decimals=3).tolist()
        [0.745, 1.51, 0.745]
    """
    u = (schedule.timesteps + 0.5).to(torch.float64) / schedule.num_original
    weight = torch.exp(-2 * (u - 0.5) ** 2) - math.exp(-0.5)
    return weight / weight.mean()


def _straight_time(schedule: NoiseSchedule) -> Tensor:
    """Time in (0, 1] at which a straight path has the schedule's SNR, shape (T,)."""
    return schedule.sigma / (schedule.alpha + schedule.sigma)


WEIGHTINGS.register_module(name="sigma_sqrt", module=sigma_sqrt)
WEIGHTINGS.register_module(name="cosmap", module=cosmap)
WEIGHTINGS.register_module(name="bell", module=bell)
