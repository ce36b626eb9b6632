"""Weightings: how much the loss at each timestep counts, as a function of the noise schedule.

`conversion.py` converts a weight to another prediction type.

Dims: T timesteps.
"""

import torch
from torch import Tensor

from speedit_plugins.policies.densities.areas import check_tau
from speedit_plugins.policies.schedule import NoiseSchedule
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


# The weight is defined on the epsilon loss. `build_policy` converts it to the model's prediction type.
min_snr.defined_on = "epsilon"  # type: ignore[attr-defined]  # functions take attributes


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
WEIGHTINGS.register_module(name="inverse_density", module=inverse_density)
