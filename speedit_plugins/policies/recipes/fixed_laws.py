"""Policies whose draws follow a fixed law over time or log-SNR, from papers and trainers.

Papers count time from the data or from the noise. Here u = 1 is noise, and high log-SNR is clean.
"""

from speedit_plugins.policies.recipes.recipe import Recipe
from speedit_plugins.registry import POLICIES


def mode(*, scale: float = 1.29) -> Recipe:
    """Heavy-tailed draws, weight 1. Source: Esser et al. 2024, arXiv:2403.03206.

    Args:
        scale: see the density `mode`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("mode", NoiseSchedule.rectified_flow(4)).density.round(decimals=3).tolist()
        [0.134, 0.366, 0.366, 0.134]
    """
    return {"density": {"type": "mode", "scale": scale}, "weighting": {"type": "constant"}}


def cosmap() -> Recipe:
    """Draws of the cosine schedule's noise levels on a straight path, weight 1.

    Source: Esser et al. 2024, arXiv:2403.03206.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("cosmap", NoiseSchedule.rectified_flow(4)).density.round(decimals=3).tolist()
        [0.205, 0.295, 0.295, 0.205]
    """
    return {"density": {"type": "cosmap"}, "weighting": {"type": "constant"}}


def beta(*, a: float = 0.8, b: float = 1.0) -> Recipe:
    """Beta draws, weight 1. Source: B-TTDM, Zheng et al. 2024 (ECCV).

    With a = 1 and b = 2 it is MixFlow's law, arXiv:2512.19311.

    Args:
        a: see the density `beta`.
        b: see the density `beta`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy({"type": "beta", "a": 1.0, "b": 2.0}, NoiseSchedule.rectified_flow(2))
        >>> policy.density.round(decimals=9).tolist()
        [0.75, 0.25]
    """
    return {"density": {"type": "beta", "a": a, "b": b}, "weighting": {"type": "constant"}}


def u_shaped(*, a: float = 4.0) -> Recipe:
    """Draws at both ends of the path, weight 1, for reflow. Source: Lee et al. 2024, arXiv:2405.20320.

    Args:
        a: see the density `u_shaped`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("u_shaped", NoiseSchedule.rectified_flow(4)).density.round(decimals=3).tolist()
        [0.338, 0.162, 0.162, 0.338]
    """
    return {"density": {"type": "u_shaped", "a": a}, "weighting": {"type": "constant"}}


def jit(*, mean: float = 0.8, std: float = 0.8) -> Recipe:
    """JiT's draws, logit-normal and noisier than the middle of the path, weight 1.

    Source: Li & He 2025, arXiv:2511.13720. There time is 1 at the data, so the mean has the other sign, -0.8.
    JiT predicts x0 and takes the loss of the flow; it is for a host that does the same, or predicts a flow.

    Args:
        mean: see the density `logit_normal`.
        std: see the density `logit_normal`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("jit", NoiseSchedule.rectified_flow(2)).density.round(decimals=3).tolist()
        [0.159, 0.841]
    """
    return {"density": {"type": "logit_normal", "mean": mean, "std": std}, "weighting": {"type": "constant"}}


def laplace(*, mu: float = 0.0, b: float = 0.5) -> Recipe:
    """Laplace draws of log-SNR, weight 1. Source: Hang et al. 2024, arXiv:2407.03297.

    Args:
        mu: see the density `laplace`.
        b: see the density `laplace`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = build_policy("laplace", schedule).density
        >>> round(float(density[schedule.log_snr > 0].sum()), 2)
        0.5
    """
    return {"density": {"type": "laplace", "mu": mu, "b": b}, "weighting": {"type": "constant"}}


def cauchy(*, mu: float = 0.0, gamma: float = 1.0) -> Recipe:
    """Cauchy draws of log-SNR, weight 1. Source: Hang et al. 2024, arXiv:2407.03297.

    Args:
        mu: see the density `cauchy`.
        gamma: see the density `cauchy`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = build_policy("cauchy", schedule).density
        >>> round(float(density[schedule.log_snr > 0].sum()), 2)
        0.5
    """
    return {"density": {"type": "cauchy", "mu": mu, "gamma": gamma}, "weighting": {"type": "constant"}}


def edm(*, mean: float = 2.4, std: float = 2.4, data_std: float = 0.5) -> Recipe:
    """EDM's draws and weights: ln(sigma / alpha) ~ N(-1.2, 1.2^2). log-SNR is -2 times that.

    The law is meant for data of standard deviation 1/2. Data c times as large want `mean` less 2 ln c.
    `build_policy` converts the weights to the model's prediction type; a model of epsilon has none at SNR 0.
    Source: Karras et al. 2022, arXiv:2206.00364, table 1.

    Args:
        mean: mean of log-SNR.
        std: standard deviation of log-SNR.
        data_std: see the weighting `edm`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = build_policy("edm", schedule).density
        >>> round(float(density[schedule.snr > 1].sum()), 2)  # sigma < 1 in 84 % of EDM's draws
        0.84
    """
    return {
        "density": {"type": "log_snr_normal", "mean": mean, "std": std},
        "weighting": {"type": "edm", "data_std": data_std},
    }


def edm2(*, mean: float = 0.8, std: float = 2.0, data_std: float = 0.5) -> Recipe:
    """EDM2's draws, ln(sigma / alpha) ~ N(-0.4, 1), and EDM's weights. The rest as in `edm`.

    EDM2 also divides the loss by a learned uncertainty, which is not in here.
    Source: Karras et al. 2024, arXiv:2312.02696, and the release.

    Args:
        mean: mean of log-SNR.
        std: standard deviation of log-SNR.
        data_std: see the weighting `edm`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.linear(1000)
        >>> density = build_policy("edm2", schedule).density
        >>> round(float(density[schedule.snr > 1].sum()), 2)  # sigma < 1 in 66 % of EDM2's draws
        0.66
    """
    return edm(mean=mean, std=std, data_std=data_std)


for _recipe in (mode, cosmap, beta, u_shaped, jit, laplace, cauchy, edm, edm2):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
