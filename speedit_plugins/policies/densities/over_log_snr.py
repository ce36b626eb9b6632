"""Densities over log-SNR: every schedule gets the same distribution of noise levels.

Dims: T timesteps.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.registry import DENSITIES


def log_snr_normal(
    schedule: NoiseSchedule,
    data_spectrum: Callable[[], DataSpectrum] | None = None,
    *,
    mean: float | None = None,
    offset: float = 0.0,
    std: float = 1.2,
    clean_std: float | None = None,
    clean_share: float = 0.0,
) -> Density:
    """Density in which log-SNR follows a split normal distribution around mean + offset.

    A split normal is continuous and has one standard deviation on each side of its mode. It is cut at the
    schedule's ends. Each timestep gets the mass between the midpoints to its two neighbours. A timestep with
    SNR 0 has no log-SNR. It gets 1 / T, as in uniform draws, because sampling begins there.

    Args:
        data_spectrum: returns the spectrum of the data. Called only if `mean` is None.
        mean: centre in log-SNR, finite. Lower is noisier. None takes `log_snr_at()` of the data's spectrum.
        offset: added to `mean`. Above 0 is cleaner.
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
    _check_centre_and_widths(mean, offset, std, clean_std)
    if not 0 <= clean_share < 1:
        raise ValueError(f"log_snr_normal needs clean_share in [0, 1), got {clean_share}")
    log_snr = schedule.log_snr[schedule.snr > 0]
    if len(log_snr) < 2:
        raise ValueError(f"log_snr_normal needs T >= 2, got T = {len(log_snr)} with SNR > 0")
    # Last, because reading the data may take a while.
    if mean is None:
        if data_spectrum is None:
            raise ValueError(
                "log_snr_normal needs mean, the log-SNR at which half of your data's variance is explained;"
                " got none. Measure it: speedit_plugins.DataSpectrum.of(latents).log_snr_at()"
            )
        mean = data_spectrum().log_snr_at()
    centre = mean + offset
    law = _split_normal(log_snr, centre, std, std if clean_std is None else clean_std)
    if clean_share:
        law = (1 - clean_share) * law + clean_share * _evenly_above(log_snr, centre)
    table = torch.full_like(schedule.alpha, 1 / schedule.num_timesteps)
    table[: len(log_snr)] = law * (len(log_snr) / schedule.num_timesteps)
    return Density(table)


def _evenly_above(log_snr: Tensor, centre: float) -> Tensor:
    cleaner = (log_snr > centre).double()
    if not cleaner.any():
        raise ValueError(
            f"log_snr_normal with a clean_share needs timesteps cleaner than log-SNR {centre:.2f}, got none"
        )
    return cleaner / cleaner.sum()


def _check_centre_and_widths(mean: float | None, offset: float, std: float, clean_std: float | None) -> None:
    is_finite = math.isfinite(offset + (0.0 if mean is None else mean))
    if not (is_finite and all(0 < width < math.inf for width in (std, clean_std) if width is not None)):
        raise ValueError(
            "log_snr_normal needs a finite mean and offset, and std and clean_std > 0,"
            f" got {mean}, {offset}, {std} and {clean_std}"
        )


def _split_normal(log_snr: Tensor, mode: float, noisy_std: float, clean_std: float) -> Tensor:
    """Shares (T,) of a split normal law between the midpoints to the neighbours; log_snr (T,) falls."""
    edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])  # (T + 1,)
    widths = torch.full_like(edges, clean_std).masked_fill(edges < mode, noisy_std)
    z = (edges - mode) / widths
    # Each side counts its mass from its own end. From the other end, the mass of a far bin would be a
    # difference of two values near 1, so 0. erfc is accurate in the tails; torch's ndtr is 0 below -8.3.
    tail = torch.special.erfc(z.abs() / math.sqrt(2)) * widths / (noisy_std + clean_std)  # (T + 1,)
    below = torch.where(z < 0, tail, 1 - tail)
    mass = torch.where(z[1:] > 0, tail.diff(), -below.diff())
    if not mass.any():
        raise ValueError(
            f"log_snr_normal needs mean + offset near the schedule's log-SNR, {log_snr[-1]:.2f} to"
            f" {log_snr[0]:.2f}, got {mode:.2f}: no timestep would ever be drawn"
        )
    if not float(log_snr[-1]) < mode < float(log_snr[0]):
        warnings.warn(
            f"log_snr_normal is centred at log-SNR {mode:.2f}, outside the schedule's {log_snr[-1]:.2f} to"
            f" {log_snr[0]:.2f}: was the mean measured on samples scaled as the model sees them?",
            stacklevel=3,
        )
    return mass / mass.sum()


DENSITIES.register_module(name="log_snr_normal", module=log_snr_normal)
