"""Fixed densities that treat the areas of a noise schedule differently: SpeeD's and SpeeDiT's.

Dims: T timesteps.
"""

import math
import warnings

import torch
from torch import Tensor

from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import CONVERGENCE_SNR, NoiseSchedule
from speedit_plugins.registry import DENSITIES


def thinned(
    schedule: NoiseSchedule, *, k: float = 5.0, snr_boundary: float = CONVERGENCE_SNR, tau: int | None = None
) -> Density:
    """SpeeD's density: each timestep of the convergence area is drawn k times less often than the others.

    P = k / (T + tau (k - 1)) for an index below tau, and 1 / (T + tau (k - 1)) from tau on.
    Source: Wang et al. 2024, arXiv:2405.17403.

    Args:
        k: how many times rarer the convergence area is, > 0. 1 gives uniform draws.
        snr_boundary: the area begins where the SNR falls below this value, > 0.
        tau: first index of the area, in (0, T]. Give it in place of `snr_boundary`.

    Raises:
        ValueError: a parameter out of range, both `tau` and `snr_boundary`, or no index before the boundary.

    Warns:
        UserWarning: the draws are uniform, because k is 1 or the schedule has no convergence area.

    Example:
        >>> density = thinned(NoiseSchedule.linear(1000), k=5.0)
        >>> density.boundary_index, round(float(density.table[0] / density.table[-1]), 6)
        (700, 5.0)
    """
    if not 0 < k < math.inf:
        raise ValueError(f"thinned needs k > 0, got {k}")
    if tau is not None and snr_boundary != CONVERGENCE_SNR:
        raise ValueError(f"give tau or snr_boundary, got both: {tau} and {snr_boundary}")
    boundary = schedule.convergence_index(snr_boundary) if tau is None else check_tau(tau, schedule)
    if boundary == 0:
        raise ValueError(f"no timestep has an SNR >= {snr_boundary:g}, the highest is {schedule.snr.max():g}")
    if k == 1 or boundary == schedule.num_timesteps:
        reason = "k = 1" if k == 1 else f"the convergence area begins at index {boundary}, the end"
        warnings.warn(f"thinned draws every timestep equally often: {reason}", stacklevel=2)
    table = torch.ones_like(schedule.alpha)
    table[:boundary] = k
    return Density(table, boundary, is_relative=True)


def asymmetric(
    schedule: NoiseSchedule, *, threshold: float = 0.1, sharpness: float = 1000.0, reflected: bool = True
) -> Density:
    """SpeeDiT's density: steep timesteps of sqrt(1 - alpha-bar) are drawn 5 times as often as flat ones.

    p ~ tanh(sharpness (d sqrt(1 - alpha-bar) / du - threshold)) + 1.5, so 2.5 against 0.5. Then half of the
    draws are reflected at the boundary m, see `reflect`.
    Source: `SpeeDiffusion` in the SpeeDiT README. Its constants 1e6 and 1e-4 are per step at T = 1000.

    Args:
        threshold: slope per u between steep and flat, > 0.
        sharpness: how fast the density switches between the two, > 0.
        reflected: return q = (p + R p) / 2, where R p is the reflection of p. False returns p.

    Raises:
        ValueError: a parameter out of range, or T < 2.

    Warns:
        UserWarning: no slope is below the threshold.

    Example:
        >>> density = asymmetric(NoiseSchedule.linear(1000), reflected=False)
        >>> density.boundary_index, round(float(density.table[0] / density.table[-1]), 3)
        (642, 5.0)
    """
    if not (threshold > 0 and sharpness > 0):
        raise ValueError(f"asymmetric needs threshold > 0 and sharpness > 0, got {threshold} and {sharpness}")
    slope = schedule.gradient((1 - schedule.alphas_cumprod).sqrt())
    p = torch.tanh(sharpness * (slope - threshold)) + 1.5
    pivot = reflection_pivot(schedule, threshold=threshold)
    if pivot == schedule.num_timesteps:
        warnings.warn(f"asymmetric has nothing to thin: no slope falls below {threshold}", stacklevel=2)
    table = (p + push_reflected(p, pivot)) / 2 if reflected else p
    return Density(table, pivot, is_relative=True)


def reflection_pivot(schedule: NoiseSchedule, *, threshold: float = 0.1) -> int:
    """SpeeDiT's "meaningful steps" m in [1, T]: one past the first flat index, T if no index is flat.

    Example:
        >>> reflection_pivot(NoiseSchedule.linear(1000))
        642
    """
    return min(schedule.flat_index(threshold) + 1, schedule.num_timesteps)


def reflect(index: Tensor, pivot: int, num_timesteps: int) -> Tensor:
    """SpeeDiT's reflection of each index t at the pivot m: |t - m|, clipped to [0, T), same shape.

    Example:
        >>> reflect(torch.arange(6), pivot=4, num_timesteps=6).tolist()
        [4, 3, 2, 1, 0, 1]
    """
    return (index - pivot).abs().clamp(max=num_timesteps - 1)


def push_reflected(table: Tensor, pivot: int) -> Tensor:
    """Distribution (T,) of the reflected index, if the index itself has the distribution `table` (T,).

    Example:
        >>> push_reflected(torch.tensor([0.5, 0.25, 0.25]), pivot=1).tolist()  # 0 and 2 go to 1, 1 goes to 0
        [0.25, 0.75, 0.0]
    """
    target = reflect(torch.arange(len(table), device=table.device), pivot, len(table))
    return torch.zeros_like(table).index_add(0, target, table)


def check_tau(tau: int, schedule: NoiseSchedule) -> int:
    """`tau` as an int.

    Raises:
        ValueError: `tau` is not a whole number in (0, T].
    """
    if isinstance(tau, bool) or int(tau) != tau or not 0 < tau <= schedule.num_timesteps:
        raise ValueError(f"tau needs to be an index in (0, {schedule.num_timesteps}], got {tau}")
    return int(tau)


DENSITIES.register_module(name="thinned", module=thinned)
DENSITIES.register_module(name="asymmetric", module=asymmetric)
