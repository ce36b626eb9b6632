"""Policies that follow the losses of the training."""

from typing import Literal

from speedit_plugins.policies.recipes.recipe import Recipe
from speedit_plugins.registry import POLICIES


def loss_balanced(
    *,
    over: Literal["time", "log_snr"] = "time",
    uniform_floor: float = 0.05,
    warmup_losses: int = 5_000,
    refresh_updates: int = 8,
) -> Recipe:
    """VDM++: draws follow the expected loss, weights keep the objective of uniform draws.

    The weight multiplies the whole loss. Source: Kingma & Gao 2023, arXiv:2303.00848.

    Args:
        over: see `LossBalanced`.
        uniform_floor: see `LossBalanced`.
        warmup_losses: see `LossBalanced`.
        refresh_updates: see `LossBalanced`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy("loss_balanced", NoiseSchedule.linear(1000))
        >>> policy.scope, policy.learns, round(policy.mean_weight, 6)  # uniform until losses have been seen
        ('loss', True, 1.0)
    """
    return {
        "density": {
            "type": "loss_balanced",
            "over": over,
            "uniform_floor": uniform_floor,
            "warmup_losses": warmup_losses,
            "refresh_updates": refresh_updates,
        },
        "weighting": {"type": "inverse_density"},
        "scope": "loss",
    }


def info_noise(
    *,
    gate: float | None = None,
    divide_by_weight: bool = False,
    uniform_floor: float = 0.05,
    warmup_losses: int = 20_000,
    refresh_updates: int = 8,
) -> Recipe:
    """InfoNoise: draws follow the rate of the conditional entropy, weight 1.

    Source: Raya et al. 2026, arXiv:2602.18647.

    Args:
        gate: see `InfoNoise`.
        divide_by_weight: see `InfoNoise`.
        uniform_floor: see `InfoNoise`.
        warmup_losses: see `InfoNoise`.
        refresh_updates: see `InfoNoise`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy("info_noise", NoiseSchedule.rectified_flow(1000))
        >>> policy.learns, round(float(policy.density.max()), 6)  # uniform until losses have been seen
        (True, 0.001)
    """
    return {
        "density": {
            "type": "info_noise",
            "gate": gate,
            "divide_by_weight": divide_by_weight,
            "uniform_floor": uniform_floor,
            "warmup_losses": warmup_losses,
            "refresh_updates": refresh_updates,
        },
        "weighting": {"type": "constant"},
    }


def adaptive(
    *, round_updates: int = 40, rate: float = 0.1, strength: float = 1.0, uniform_floor: float = 0.05
) -> Recipe:
    """Draws go where training lately lowered the variational bound most, weight 1.

    Source: Kim et al. 2025, arXiv:2411.09998, in a form for losses alone.

    Args:
        round_updates: see `LearningProgress`.
        rate: see `LearningProgress`.
        strength: see `LearningProgress`.
        uniform_floor: see `LearningProgress`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy({"type": "adaptive", "strength": 0.5}, NoiseSchedule.linear(1000))
        >>> policy.learns, policy.mean_weight
        (True, 1.0)
    """
    return {
        "density": {
            "type": "adaptive",
            "round_updates": round_updates,
            "rate": rate,
            "strength": strength,
            "uniform_floor": uniform_floor,
        },
        "weighting": {"type": "constant"},
    }


def uncertainty(*, max_ratio: float = 1000.0, refresh_updates: int = 8) -> Recipe:
    """Uniform draws, weights 1 / E[loss at this noise level]. Source: Karras et al. 2024, arXiv:2312.02696.

    Args:
        max_ratio: see `Uncertainty`.
        refresh_updates: see `Uncertainty`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("uncertainty", NoiseSchedule.linear(1000)).learns
        True
    """
    return {
        "density": {"type": "uniform"},
        "weighting": {
            "type": "uncertainty",
            "max_ratio": max_ratio,
            "refresh_updates": refresh_updates,
        },
    }


for _recipe in (loss_balanced, info_noise, adaptive, uncertainty):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
