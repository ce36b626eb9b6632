"""Density tables from the two tails of a law: the mass below a value and the mass above it.

A bin's mass is a difference of tails. Each law gives both, because far from its middle only the nearer tail
is accurate: the other one is almost 1, and the difference of two such values would be 0.

Dims: T timesteps, S timesteps with SNR > 0, E edges.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import NoiseSchedule

# Values (E,) -> mass below each of them and mass above it, both (E,).
Tails = Callable[[Tensor], tuple[Tensor, Tensor]]


def over_time(schedule: NoiseSchedule, tails: Tails) -> Density:
    """Density of a law over u: index i has the exact mass of its bin [i / T, (i + 1) / T).

    Args:
        tails: mass below u and mass above it, for u in [0, 1].

    Example:
        >>> over_time(NoiseSchedule.cosine(2), lambda u: (u**2, 1 - u**2)).table.tolist()
        [0.25, 0.75]
    """
    edges = torch.linspace(0, 1, schedule.num_timesteps + 1, dtype=torch.float64, device="cpu")
    return Density(_mass(edges, tails))


def signal_log_snr(schedule: NoiseSchedule, law: str) -> Tensor:
    """log-SNR of the timesteps with SNR > 0, shape (S,), falling.

    Raises:
        ValueError: S < 2. The message names the law.
    """
    log_snr = schedule.log_snr[schedule.snr > 0]
    if len(log_snr) < 2:
        raise ValueError(f"{law} needs T >= 2, got T = {len(log_snr)} with SNR > 0")
    return log_snr


def log_snr_edges(log_snr: Tensor) -> Tensor:
    """The midpoints between neighbours, and both ends, of log-SNR (S,), S >= 1; shape (S + 1,).

    Example:
        >>> log_snr_edges(torch.tensor([2.0, 0.0, -4.0])).tolist()
        [2.0, 1.0, -2.0, -4.0]
    """
    return torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])


def log_snr_shares(log_snr: Tensor, tails: Tails, *, law: str, centre: float, centre_name: str) -> Tensor:
    """Share of each timestep under a law over log-SNR, cut at the schedule's ends, shape (S,), sum 1.

    Each timestep gets the mass between the midpoints to its two neighbours.

    Args:
        log_snr: falling, shape (S,).
        tails: mass below a log-SNR and mass above it.
        law: the law's name in messages.
        centre: log-SNR of the law's middle.
        centre_name: what the user calls the centre.

    Raises:
        ValueError: no timestep has any mass.

    Warns:
        UserWarning: the centre is outside the schedule's range.
    """
    edges = log_snr_edges(log_snr)
    mass = _mass(edges.flip(0), tails).flip(0)
    span = f"{log_snr[-1]:.2f} to {log_snr[0]:.2f}"
    if not mass.any():
        raise ValueError(
            f"{law} needs {centre_name} near the schedule's log-SNR, {span}, got {centre:.2f}: no timestep"
            " would ever be drawn"
        )
    if not float(log_snr[-1]) < centre < float(log_snr[0]):
        warnings.warn(
            f"{law} is centred at log-SNR {centre:.2f}, outside the schedule's {span}: is the centre meant"
            " for data scaled as the model sees them?",
            stacklevel=3,
        )
    return mass / mass.sum()


def with_pure_noise(schedule: NoiseSchedule, shares: Tensor) -> Density:
    """Density with these shares (S,) of the timesteps with SNR > 0, and 1 / T for one with SNR 0.

    A timestep with SNR 0 has no log-SNR. It is drawn as in uniform draws, because sampling begins there.
    """
    table = torch.full_like(schedule.alpha, 1 / schedule.num_timesteps)
    table[: len(shares)] = shares * (len(shares) / schedule.num_timesteps)
    return Density(table)


def _mass(edges: Tensor, tails: Tails) -> Tensor:
    """Mass between neighbouring edges (E,), which rise; shape (E - 1,)."""
    below, above = tails(edges)
    # Rounding may turn an empty bin into -1e-17.
    return torch.where(below[1:] < above[1:], below.diff(), -above.diff()).clamp(min=0)
