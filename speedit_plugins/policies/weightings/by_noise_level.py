"""Weightings: how much the loss at each timestep counts, as a function of the noise schedule.

Those here depend on the SNR; `by_time.py` has those that depend on time. One that is marked `defined_on` is
meant for the loss of one prediction type, and `conversion.py` converts it to that of the model.

Dims: T timesteps.
"""

import math

import torch
from torch import Tensor

from speedit_plugins.policies.densities.areas import check_tau
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.conversion import defined_on
from speedit_plugins.registry import WEIGHTINGS


def constant(schedule: NoiseSchedule) -> Tensor:
    """Weight 1 at every timestep, shape (T,).

    Example:
        >>> constant(NoiseSchedule.cosine(3)).tolist()
        [1.0, 1.0, 1.0]
    """
    return torch.ones_like(schedule.alpha)


def change_aware(
    schedule: NoiseSchedule, *, lam: float = 0.6, tau: int | None = None, beyond: float | None = None
) -> Tensor:
    """SpeeD's weight, largest where the process changes fastest, shape (T,), in [1 - lam, lam].

    w = (1 - lam) + (2 lam - 1) minmax(d(1 - alpha-bar) / dt), where minmax scales to [0, 1].
    Source: Wang et al. 2024, arXiv:2405.17403.

    Args:
        lam: largest weight, in [0.5, 1]. 0.5 makes all weights 0.5.
        tau: index in (0, T] from which the weight is `beyond`, as in the released code. Needs `beyond`.
        beyond: weight from `tau` on, >= 0. None uses the formula at every timestep.

    Raises:
        ValueError: a parameter out of range, only one of `tau` and `beyond`, or T < 2.

    Example:
        >>> weight = change_aware(NoiseSchedule.linear(1000), lam=0.6)
        >>> round(float(weight.min()), 6), round(float(weight.max()), 6), int(weight.argmax())
        (0.4, 0.6, 219)
    """
    if not 0.5 <= lam <= 1:
        raise ValueError(
            f"change_aware needs lam in [0.5, 1], got {lam}: the weights lie between 1 - lam and lam"
        )
    if (tau is None) != (beyond is None):
        raise ValueError(
            f"tau and beyond work together: give both or neither, got tau={tau}, beyond={beyond}"
        )
    change = schedule.gradient(1 - schedule.alphas_cumprod)
    span = change.max() - change.min()
    scaled = (change - change.min()) / span if span > 0 else torch.zeros_like(change)
    weight = (1 - lam) + (2 * lam - 1) * scaled
    if tau is not None and beyond is not None:
        if beyond < 0:
            raise ValueError(f"change_aware needs beyond >= 0, got {beyond}")
        weight[check_tau(tau, schedule) :] = beyond
    return weight


def p2(schedule: NoiseSchedule, *, gamma: float = 1.0, k: float = 1.0) -> Tensor:
    """P2 weight (k + SNR)^-gamma, shape (T,). With gamma = k = 1 it is 1 - alpha-bar.

    Source: Choi et al. 2022, arXiv:2204.00227.

    Args:
        gamma: how strongly the weight falls towards clean timesteps, >= 0. 0 makes all weights 1.
        k: keeps the weight finite at SNR = 0, > 0.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])  # SNR 3 and 1
        >>> p2(schedule).round(decimals=6).tolist()
        [0.25, 0.5]
    """
    if not (gamma >= 0 and k > 0):
        raise ValueError(f"p2 needs gamma >= 0 and k > 0, got {gamma} and {k}")
    return (k + schedule.snr) ** -gamma


@defined_on("epsilon")
def min_snr(schedule: NoiseSchedule, *, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight for a noise-predicting model: min(SNR, gamma) / SNR, in (0, 1], shape (T,).

    Source: Hang et al. 2023, arXiv:2303.09556.

    Args:
        gamma: SNR up to which the weight is 1, > 0. Above it the weight falls as gamma / SNR.

    Raises:
        ValueError: `gamma` <= 0.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5])  # SNR 9 and 1
        >>> min_snr(schedule, gamma=4.5).round(decimals=6).tolist()
        [0.5, 1.0]
    """
    if not gamma > 0:
        raise ValueError(f"min_snr needs gamma > 0, got {gamma}")
    # min(gamma / SNR, 1) is the same fraction, and stays finite at SNR = 0.
    return (gamma / schedule.snr).clamp(max=1.0)


@defined_on("epsilon")
def soft_min_snr(schedule: NoiseSchedule, *, gamma: float = 4.0) -> Tensor:
    """Min-SNR without its corner, for a noise-predicting model: gamma / (SNR + gamma), in (0, 1], shape (T,).

    On the loss of x0 it is half of the harmonic mean of SNR and gamma, 1 / (sigma^2 + 1 / gamma).
    Source: Crowson et al. 2024, arXiv:2401.11605. Its code, k-diffusion, has gamma = 1 / sigma_data^2, so 4
    for data of standard deviation 1/2. SimpleTuner puts the sigma of a variance-preserving schedule into that
    code's formula, where the noise level sigma / alpha belongs, and gets other weights.

    Args:
        gamma: SNR at which the weight is 1/2, > 0.

    Raises:
        ValueError: `gamma` out of range.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.8, 0.5])  # SNR 4 and 1
        >>> soft_min_snr(schedule).round(decimals=6).tolist()
        [0.5, 0.8]
    """
    if not 0 < gamma < math.inf:
        raise ValueError(f"soft_min_snr needs gamma > 0, got {gamma}")
    return gamma / (schedule.snr + gamma)


@defined_on("x0")
def debiased(schedule: NoiseSchedule, *, max_snr: float = 1000.0) -> Tensor:
    """Debiased estimation, as a weight on the loss of x0: SNR / sqrt(min(SNR, max_snr)), shape (T,).

    On the loss of epsilon that is 1 / sqrt(min(SNR, max_snr)), infinite at SNR 0.
    Source: Yu et al. 2023, arXiv:2310.08442. The limit is kohya's and OneTrainer's, not the paper's. For
    models of v, kohya has 1 / (SNR + 1) and OneTrainer its square root; the same objective as on epsilon is
    sqrt(SNR) / (SNR + 1).

    Args:
        max_snr: SNR from which the weight on the loss of epsilon falls no further, > 0.

    Raises:
        ValueError: `max_snr` <= 0.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.8, 0.5])  # SNR 4 and 1
        >>> debiased(schedule).round(decimals=6).tolist()
        [2.0, 1.0]
    """
    if not max_snr > 0:
        raise ValueError(f"debiased needs max_snr > 0, got {max_snr}")
    # The same quotient, without 0 / 0 at SNR 0.
    return torch.maximum(schedule.snr.sqrt(), schedule.snr / max_snr**0.5)


@defined_on("x0")
def truncated_snr(schedule: NoiseSchedule) -> Tensor:
    """Truncated SNR, as a weight on the loss of x0: max(SNR, 1), shape (T,).

    On the loss of epsilon that is max(SNR, 1) / SNR, infinite at SNR 0. The weight makes x0 count at high
    noise too, where the loss of epsilon says little about it.
    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 (`snr_trunc` in the release).

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.25])  # SNR 3 and 1/3
        >>> truncated_snr(schedule).round(decimals=6).tolist()
        [3.0, 1.0]
    """
    return schedule.snr.clamp(min=1.0)


@defined_on("x0")
def edm(schedule: NoiseSchedule, *, data_std: float = 0.5) -> Tensor:
    """EDM's weight on the loss of x0: (s^2 + data_std^2) / (s data_std)^2, shape (T,). s is sigma / alpha.

    It is SNR + 1 / data_std^2. The preconditioned network of EDM then has weight 1 at every noise level.
    Source: Karras et al. 2022, arXiv:2206.00364, table 1.

    Args:
        data_std: standard deviation of the data as the model sees them, > 0.

    Raises:
        ValueError: `data_std` out of range.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.0])  # SNR 3 and 0
        >>> edm(schedule).round(decimals=6).tolist()
        [7.0, 4.0]
    """
    if not 0 < data_std < math.inf:
        raise ValueError(f"edm needs data_std > 0, got {data_std}")
    return schedule.snr + data_std**-2


def inverse_density(schedule: NoiseSchedule, *, density: Tensor) -> Tensor:
    """Importance weight 1 / (T p), shape (T,): draws from p then estimate the mean loss of uniform draws.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 18.

    Args:
        density: probability p of drawing each index, > 0, shape (T,).

    Raises:
        ValueError: a probability that is not above 0.

    Example:
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])
        >>> inverse_density(schedule, density=torch.tensor([0.25, 0.5])).tolist()
        [2.0, 1.0]
    """
    if not (density > 0).all():
        raise ValueError(
            f"inverse_density needs a density > 0 everywhere, got {int((density == 0).sum())} zeros"
        )
    return 1 / (schedule.num_timesteps * density)


WEIGHTINGS.register_module(name="constant", module=constant)
WEIGHTINGS.register_module(name="change_aware", module=change_aware)
WEIGHTINGS.register_module(name="p2", module=p2)
WEIGHTINGS.register_module(name="min_snr", module=min_snr)
WEIGHTINGS.register_module(name="soft_min_snr", module=soft_min_snr)
WEIGHTINGS.register_module(name="debiased", module=debiased)
WEIGHTINGS.register_module(name="truncated_snr", module=truncated_snr)
WEIGHTINGS.register_module(name="edm", module=edm)
WEIGHTINGS.register_module(name="inverse_density", module=inverse_density)
