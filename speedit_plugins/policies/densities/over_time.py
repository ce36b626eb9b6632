"""Fixed densities over time. u = 0 is clean, u = 1 is noise; index i has the mass of [i / T, (i + 1) / T).

Dims: T timesteps.
"""

import math

import torch

from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DENSITIES


def uniform(schedule: NoiseSchedule) -> Density:
    """Every index is equally likely.

    Example:
        >>> uniform(NoiseSchedule.cosine(4)).table.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return Density(torch.ones_like(schedule.alpha), is_relative=True)


def logit_normal(schedule: NoiseSchedule, *, mean: float = 0.0, std: float = 1.0) -> Density:
    """Density in which logit(u) is normal. Index i has the exact mass of its bin [i / T, (i + 1) / T).

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1. u = 1 is noise, so a positive mean is noisier.

    Args:
        mean: mean of logit(u), finite.
        std: standard deviation of logit(u), > 0.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> logit_normal(NoiseSchedule.rectified_flow(4)).table.round(decimals=3).tolist()
        [0.136, 0.364, 0.364, 0.136]
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"logit_normal needs a finite mean and std > 0, got {mean} and {std}")
    edges = torch.linspace(0, 1, schedule.num_timesteps + 1, dtype=torch.float64, device="cpu")
    cumulative = torch.special.ndtr((torch.logit(edges) - mean) / std)
    return Density(cumulative.diff())


DENSITIES.register_module(name="uniform", module=uniform)
DENSITIES.register_module(name="logit_normal", module=logit_normal)
