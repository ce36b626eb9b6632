"""Densities over log-SNR: every schedule gets the same distribution of noise levels.

Dims: T timesteps.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from speedit_plugins.policies.densities.cumulative import log_snr_shares, signal_log_snr, with_pure_noise
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.registry import DENSITIES


def log_snr_normal(
    schedule: NoiseSchedule,
    data_spectrum: Callable[[], DataSpectrum] | None = None,
    *,
    mean: float | None = None,
    slope: float = 1.0,
    offset: float = 0.0,
    std: float = 1.2,
    clean_std: float | None = None,
    clean_share: float = 0.0,
) -> Density:
    """Density in which log-SNR follows a split normal distribution around slope * mean + offset.

    A split normal is continuous and has one standard deviation on each side of its mode. It is cut at the
    schedule's ends. Each timestep gets the mass between the midpoints to its two neighbours, and one with SNR
    0 gets 1 / T, as in uniform draws, because sampling begins there.

    Args:
        data_spectrum: returns the spectrum of the data. Called only if `mean` is None.
        mean: centre in log-SNR, finite. Lower is noisier. None takes `log_snr_at()` of the data's spectrum.
        slope: change of the mode for each unit of `mean`, finite.
        offset: added to slope * mean, finite. Above 0 is cleaner.
        std: standard deviation of log-SNR on the side noisier than the mode, > 0.
        clean_std: standard deviation of log-SNR on the cleaner side, > 0. None takes `std`.
        clean_share: share of the draws, in [0, 1), spread evenly over the timesteps cleaner than the mode.

    Raises:
        ValueError: a parameter out of range, neither `mean` nor `data_spectrum`, fewer than two timesteps
            with SNR > 0, no timestep with any mass, or a `clean_share` without a timestep cleaner than the
            mode.

    Warns:
        UserWarning: the mode is outside the schedule's range of log-SNR.

    Example:
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = log_snr_normal(schedule, mean=0.0, std=1.0)
        >>> round(float(density.table[schedule.log_snr > 0].sum()), 2)
        0.5
    """
    _check_centre_and_widths(mean, slope, offset, std, clean_std)
    if not 0 <= clean_share < 1:
        raise ValueError(f"log_snr_normal needs clean_share in [0, 1), got {clean_share}")
    log_snr = signal_log_snr(schedule, "log_snr_normal")
    # Last, because reading the data may take a while.
    centre = slope * (_middle(data_spectrum) if mean is None else mean) + offset
    tails = partial(
        _split_normal, mode=centre, noisy_std=std, clean_std=std if clean_std is None else clean_std
    )
    law = log_snr_shares(
        log_snr, tails, law="log_snr_normal", centre=centre, centre_name="slope * mean + offset"
    )
    if clean_share:
        law = (1 - clean_share) * law + clean_share * _evenly_above(log_snr, centre)
    return with_pure_noise(schedule, law)


def _middle(data_spectrum: Callable[[], DataSpectrum] | None) -> float:
    if data_spectrum is None:
        raise ValueError(
            "log_snr_normal needs mean, the log-SNR at which half of your data's variance is explained;"
            " got none. Measure it: speedit_plugins.DataSpectrum.of(latents).log_snr_at()"
        )
    return data_spectrum().log_snr_at()


def _evenly_above(log_snr: Tensor, centre: float) -> Tensor:
    cleaner = (log_snr > centre).double()
    if not cleaner.any():
        raise ValueError(
            f"log_snr_normal with a clean_share needs timesteps cleaner than log-SNR {centre:.2f}, got none"
        )
    return cleaner / cleaner.sum()


def _check_centre_and_widths(
    mean: float | None, slope: float, offset: float, std: float, clean_std: float | None
) -> None:
    is_finite = math.isfinite(slope + offset + (0.0 if mean is None else mean))
    if not (is_finite and all(0 < width < math.inf for width in (std, clean_std) if width is not None)):
        raise ValueError(
            "log_snr_normal needs a finite mean, slope and offset, and std and clean_std > 0,"
            f" got {mean}, {slope}, {offset}, {std} and {clean_std}"
        )


def _split_normal(log_snr: Tensor, mode: float, noisy_std: float, clean_std: float) -> tuple[Tensor, Tensor]:
    """Mass below each log-SNR and above it, of a split normal law."""
    widths = torch.full_like(log_snr, clean_std).masked_fill(log_snr < mode, noisy_std)
    z = (log_snr - mode) / widths
    # erfc is accurate in the tails; torch's ndtr is 0 below -8.3.
    tail = torch.special.erfc(z.abs() / math.sqrt(2)) * widths / (noisy_std + clean_std)
    return _both(tail, z < 0)


def laplace(schedule: NoiseSchedule, *, mu: float = 0.0, b: float = 0.5) -> Density:
    """Density in which log-SNR follows the Laplace law, exp(-|log-SNR - mu| / b) / 2b.

    It is cut at the schedule's ends; a timestep with SNR 0 gets 1 / T.
    Source: Hang et al. 2024, arXiv:2407.03297. Elsewhere it is a noise schedule (`laplace` in diffusers).

    Args:
        mu: centre in log-SNR, finite. Lower is noisier.
        b: mean distance from the centre in log-SNR, > 0.

    Raises:
        ValueError: a parameter out of range, fewer than two timesteps with SNR > 0, or no timestep with any
            mass.

    Warns:
        UserWarning: the centre is outside the schedule's range of log-SNR.

    Example:
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = laplace(schedule)
        >>> round(float(density.table[schedule.log_snr.abs() < 0.5].sum()), 2)  # 1 - 1/e
        0.63
    """
    if not (math.isfinite(mu) and 0 < b < math.inf):
        raise ValueError(f"laplace needs a finite mu and b > 0, got {mu} and {b}")

    def tails(log_snr: Tensor) -> tuple[Tensor, Tensor]:
        z = (log_snr - mu) / b
        return _both(torch.exp(-z.abs()) / 2, z < 0)

    log_snr = signal_log_snr(schedule, "laplace")
    return with_pure_noise(
        schedule, log_snr_shares(log_snr, tails, law="laplace", centre=mu, centre_name="mu")
    )


def cauchy(schedule: NoiseSchedule, *, mu: float = 0.0, gamma: float = 1.0) -> Density:
    """Density in which log-SNR follows the Cauchy law, gamma / pi ((log-SNR - mu)^2 + gamma^2).

    Its tails are heavier than those of `laplace`. It is cut at the schedule's ends; a timestep with SNR 0
    gets 1 / T. Source: Hang et al. 2024, arXiv:2407.03297.

    Args:
        mu: centre in log-SNR, finite. Lower is noisier.
        gamma: half of the draws of the uncut law are within this distance of the centre, > 0.

    Raises:
        ValueError: a parameter out of range, or fewer than two timesteps with SNR > 0.

    Warns:
        UserWarning: the centre is outside the schedule's range of log-SNR.

    Example:
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = cauchy(schedule)
        >>> round(float(density.table[schedule.log_snr > 0].sum()), 2)
        0.5
    """
    if not (math.isfinite(mu) and 0 < gamma < math.inf):
        raise ValueError(f"cauchy needs a finite mu and gamma > 0, got {mu} and {gamma}")

    def tails(log_snr: Tensor) -> tuple[Tensor, Tensor]:
        width = torch.full_like(log_snr, gamma)
        return torch.atan2(width, mu - log_snr) / math.pi, torch.atan2(width, log_snr - mu) / math.pi

    log_snr = signal_log_snr(schedule, "cauchy")
    return with_pure_noise(
        schedule, log_snr_shares(log_snr, tails, law="cauchy", centre=mu, centre_name="mu")
    )


def _both(tail: Tensor, is_below: Tensor) -> tuple[Tensor, Tensor]:
    """Mass below and above each value, from the mass beyond it as seen from the centre."""
    return torch.where(is_below, tail, 1 - tail), torch.where(is_below, 1 - tail, tail)


DENSITIES.register_module(name="log_snr_normal", module=log_snr_normal)
DENSITIES.register_module(name="laplace", module=laplace)
DENSITIES.register_module(name="cauchy", module=cauchy)
