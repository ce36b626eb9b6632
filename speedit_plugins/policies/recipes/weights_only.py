"""Policies that draw uniformly and change the weights alone, from papers and trainers."""

from speedit_plugins.policies.recipes.recipe import Recipe
from speedit_plugins.registry import POLICIES


def soft_min_snr(*, gamma: float = 4.0) -> Recipe:
    """Uniform draws, Min-SNR weights without their corner. Source: Crowson et al. 2024, arXiv:2401.11605.

    `build_policy` converts the weights to the model's prediction type.

    Args:
        gamma: see the weighting `soft_min_snr`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.8, 0.5])  # SNR 4 and 1
        >>> build_policy("soft_min_snr", schedule, "x0").weight.round(decimals=6).tolist()
        [2.0, 0.8]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "soft_min_snr", "gamma": gamma}}


def debiased(*, max_snr: float = 1000.0) -> Recipe:
    """Uniform draws, weights 1 / sqrt(min(SNR, max_snr)). Source: Yu et al. 2023, arXiv:2310.08442.

    `build_policy` converts the weights to the model's prediction type; a model of epsilon has none at SNR 0.

    Args:
        max_snr: see the weighting `debiased`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.8, 0.5])  # SNR 4 and 1
        >>> build_policy("debiased", schedule).weight.round(decimals=6).tolist()
        [0.5, 1.0]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "debiased", "max_snr": max_snr}}


def truncated_snr() -> Recipe:
    """Uniform draws, weights max(SNR, 1) on the loss of x0. Source: Salimans & Ho 2022, arXiv:2202.00512.

    `build_policy` converts the weights to the model's prediction type; a model of epsilon has none at SNR 0.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.25])  # SNR 3 and 1/3
        >>> build_policy("truncated_snr", schedule).weight.round(decimals=6).tolist()
        [1.0, 3.0]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "truncated_snr"}}


def sigma_sqrt() -> Recipe:
    """Uniform draws, weights s^-2 on the loss of a flow. Source: diffusers' and kohya's scheme of this name.

    The weights are divided by their mean: they span six orders of magnitude over 1,000 timesteps.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("sigma_sqrt", NoiseSchedule.rectified_flow(2)).weight.round(decimals=6).tolist()
        [1.8, 0.2]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "sigma_sqrt"}, "normalize": True}


def bell() -> Recipe:
    """Uniform draws, bell-shaped weights. Source: DiffSynth-Studio and ai-toolkit.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("bell", NoiseSchedule.rectified_flow(3)).weight.round(decimals=3).tolist()
        [0.745, 1.51, 0.745]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "bell"}}


for _recipe in (soft_min_snr, debiased, truncated_snr, sigma_sqrt, bell):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
