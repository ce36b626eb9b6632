"""How much each timestep's loss counts: schedule -> weight per index, and conversion of prediction types.

Dims: T timesteps.
"""

import torch
from torch import Tensor

from speedit_plugins.policies.densities import check_tau
from speedit_plugins.policies.schedule import PREDICTION_TYPES, NoiseSchedule
from speedit_plugins.registry import WEIGHTINGS


def constant(schedule: NoiseSchedule) -> Tensor:
    """1 everywhere, shape (T,)."""
    return torch.ones_like(schedule.alpha)


def change_aware(
    schedule: NoiseSchedule, *, lam: float = 0.6, tau: int | None = None, beyond: float | None = None
) -> Tensor:
    """SpeeD's weight: (1 - lam) + (2 lam - 1) minmax(d(1 - alpha-bar) / dt), in [1 - lam, lam].

    Source: Wang et al. 2024, arXiv:2405.17403.

    Args:
        lam: upper end of the weights, in [0.5, 1]; 0.5 is constant.
        tau: with `beyond`, index in (0, T] from which the weight is `beyond`, as in the released code.
        beyond: weight (>= 0) from `tau` on; None keeps the formula for all t.

    Returns:
        Weights, shape (T,).

    Raises:
        ValueError: a parameter out of range, `tau` without `beyond` or the reverse, or T < 2.
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
    """P2 weight (k + SNR)^-gamma, shape (T,); 1 - alpha-bar at gamma = k = 1.

    Source: Choi et al. 2022, arXiv:2204.00227.

    Args:
        gamma: strength, >= 0.
        k: > 0, keeps the weight finite at zero SNR.
    """
    if not (gamma >= 0 and k > 0):
        raise ValueError(f"p2 needs gamma >= 0 and k > 0, got {gamma} and {k}")
    return (k + schedule.snr) ** -gamma


def min_snr(schedule: NoiseSchedule, *, gamma: float = 5.0) -> Tensor:
    """Min-SNR weight for a noise-predicting model: min(SNR, gamma) / SNR, in (0, 1], shape (T,).

    Source: Hang et al. 2023, arXiv:2303.09556.

    Args:
        gamma: SNR above which a timestep stops gaining weight; > 0.
    """
    if not gamma > 0:
        raise ValueError(f"min_snr needs gamma > 0, got {gamma}")
    # gamma / SNR clipped at 1 is the same fraction and stays finite at zero terminal SNR.
    return (gamma / schedule.snr).clamp(max=1.0)


# What the weights are meant for: `build_policy` converts them to the model's own prediction type.
min_snr.defined_on = "epsilon"  # type: ignore[attr-defined]  # functions take attributes


def inverse_density(schedule: NoiseSchedule, *, density: Tensor) -> Tensor:
    """1 / (T p): makes the weighted loss of draws from p an unbiased estimate of the uniform one, shape (T,).

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 18.

    Args:
        density: the probability that indices are drawn with, > 0, shape (T,).
    """
    if not (density > 0).all():
        raise ValueError(
            f"inverse_density needs a density > 0 everywhere, got {int((density == 0).sum())} zeros"
        )
    return 1 / (schedule.num_timesteps * density)


def epsilon_equivalent(weight: Tensor, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """Weight on the loss of another prediction type that gives the objective of `weight` on the epsilon loss.

    The error of each target is that of epsilon times a function of alpha and sigma. Source: docs/method.md.

    Args:
        weight: weights on the epsilon loss, shape (T,).
        prediction_type: what the model predicts, one of `PREDICTION_TYPES`.

    Returns:
        Finite weights, shape (T,).
    """
    check_prediction_type(prediction_type)
    alpha, sigma = schedule.alpha, schedule.sigma
    factor = {
        "epsilon": torch.ones_like(schedule.snr),
        "x0": schedule.snr,
        "v": (alpha / (alpha**2 + sigma**2)) ** 2,  # SNR / (SNR + 1) where alpha^2 + sigma^2 = 1
        "flow": (alpha / (alpha + sigma)) ** 2,  # (1 - t)^2 on the straight path
    }
    return weight * factor[prediction_type]


def check_prediction_type(prediction_type: str) -> None:
    """Raises a ValueError unless `prediction_type` is one of `PREDICTION_TYPES`."""
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type needs one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}"
        )


WEIGHTINGS.register_module(name="constant", module=constant)
WEIGHTINGS.register_module(name="change_aware", module=change_aware)
WEIGHTINGS.register_module(name="p2", module=p2)
WEIGHTINGS.register_module(name="min_snr", module=min_snr)
WEIGHTINGS.register_module(name="inverse_density", module=inverse_density)
