"""A policy's tables as plain numbers: against the timestep and against log-SNR, by area and by quartile.

Dims: T timesteps.
"""

import math
from typing import Any

import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule, TimestepPolicy

AREAS = ("acceleration", "deceleration", "convergence")
# Shares of the draws, from the clean end, at which a table says where a law is.
QUARTILES = (0.25, 0.5, 0.75)


def describe(schedule: NoiseSchedule, policies: dict[str, TimestepPolicy]) -> dict[str, dict[str, Any]]:
    """Tables and area shares of each policy, as plain values for JSON.

    Returns:
        Per policy: density, weight and importance (density * weight, normalised), each a list of T numbers;
        density_over_log_snr and importance_over_log_snr, per unit log-SNR, None where there is no log-SNR;
        quartiles of the draws in u and log_snr; boundary_index, mean_weight and scope; and per area of the
        schedule its range [first, end), its share of the draws and its share of the importance.
    """
    return {name: _describe_one(schedule, policy) for name, policy in policies.items()}


def areas(schedule: NoiseSchedule) -> dict[str, tuple[int, int]]:
    """[first, end) indices of the three areas; the last one is empty if no SNR is below 1/143."""
    convergence = schedule.convergence_index()
    acceleration = min(schedule.acceleration_index, convergence)
    edges = (0, acceleration, convergence, schedule.num_timesteps)
    return {name: (edges[i], edges[i + 1]) for i, name in enumerate(AREAS)}


def quartiles(schedule: NoiseSchedule, density: Tensor) -> dict[str, list[float | None]]:
    """Where a quarter, half and three quarters of the draws are cleaner, in u and in log-SNR.

    A timestep's draws are even in u over its bin. None is a log-SNR of minus infinity.

    Example:
        >>> flow = NoiseSchedule.rectified_flow(1000)
        >>> found = quartiles(flow, torch.ones(1000, dtype=torch.float64) / 1000)
        >>> [round(u, 3) for u in found["u"]], [round(value, 2) for value in found["log_snr"]]
        ([0.25, 0.5, 0.75], [2.2, 0.0, -2.2])
    """
    T = schedule.num_timesteps
    upper = density.cumsum(0)
    shares = torch.tensor(QUARTILES, dtype=density.dtype) * upper[-1]
    index = torch.searchsorted(upper, shares).clamp(max=T - 1)
    place = index + 1 - (upper[index] - shares) / density[index]  # (3,), in [0, T]
    # Log-SNRs are those of the bins' middles.
    low = (place - 0.5).floor().long().clamp(0, max(T - 2, 0))
    high = (low + 1).clamp(max=T - 1)
    part = (place - 0.5 - low).clamp(0, 1)
    table = schedule.log_snr
    found = table[low] + torch.where(part > 0, part * (table[high] - table[low]), 0.0)
    return {"u": _numbers(place / T), "log_snr": _numbers_or_none(found)}


def over_log_snr(schedule: NoiseSchedule, shares: Tensor) -> list[float | None]:
    """Shares (T,) of the timesteps per unit log-SNR: shares / |d log-SNR / d index|, None without one."""
    seen = schedule.log_snr.isfinite()
    result = torch.full_like(shares, math.nan)
    if seen.sum() >= 2:
        width = torch.gradient(schedule.log_snr[seen])[0].abs()
        result[seen] = torch.where(width > 0, shares[seen] / width, math.nan)
    return _numbers_or_none(result)


def _describe_one(schedule: NoiseSchedule, policy: TimestepPolicy) -> dict[str, Any]:
    importance = policy.density * policy.weight
    # If all weights are 0, no timestep has a share.
    importance = importance / importance.sum() if importance.sum() > 0 else importance

    def shares(first: int, end: int) -> dict[str, Any]:
        draws, counts = float(policy.density[first:end].sum()), float(importance[first:end].sum())
        return {"range": [first, end], "draws": draws, "importance": counts}

    return {
        "density": _numbers(policy.density),
        "weight": _numbers(policy.weight),
        "importance": _numbers(importance),
        "density_over_log_snr": over_log_snr(schedule, policy.density),
        "importance_over_log_snr": over_log_snr(schedule, importance),
        "quartiles": quartiles(schedule, policy.density),
        "boundary_index": policy.boundary_index,
        "mean_weight": policy.mean_weight,
        "scope": policy.scope,
        "areas": {area: shares(first, end) for area, (first, end) in areas(schedule).items()},
    }


def _numbers(table: Tensor) -> list[float]:
    values: list[float] = table.tolist()
    assert all(math.isfinite(value) for value in values)
    return values


def _numbers_or_none(table: Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in table.tolist()]
