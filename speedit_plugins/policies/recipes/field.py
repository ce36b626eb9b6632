"""Policies of other papers and trainers.

`fixed_laws.py` and `weights_only.py` have more of them.
"""

from speedit_plugins.policies.recipes.recipe import Recipe
from speedit_plugins.registry import POLICIES


def uniform() -> Recipe:
    """Uniform draws, weight 1: ordinary diffusion training.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> print(build_policy("uniform", NoiseSchedule.linear(1000)))
        uniform: nine in ten draws at u = 0.05 to 0.95, mean weight 1.0000
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "constant"}}


def p2(*, gamma: float = 1.0, k: float = 1.0) -> Recipe:
    """Uniform draws, P2 weights. Source: Choi et al. 2022, arXiv:2204.00227.

    Args:
        gamma: see the weighting `p2`.
        k: see the weighting `p2`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5])  # SNR 3 and 1
        >>> build_policy("p2", schedule).weight.round(decimals=6).tolist()
        [0.25, 0.5]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "p2", "gamma": gamma, "k": k}}


def min_snr(*, gamma: float = 5.0) -> Recipe:
    """Uniform draws, Min-SNR weights. Source: Hang et al. 2023, arXiv:2303.09556.

    `build_policy` converts the weights to the model's prediction type.

    Args:
        gamma: see the weighting `min_snr`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5])  # SNR 9 and 1
        >>> build_policy({"type": "min_snr", "gamma": 4.5}, schedule, "x0").weight.round(decimals=6).tolist()
        [4.5, 1.0]
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "min_snr", "gamma": gamma}}


def logit_normal(*, mean: float = 0.0, std: float = 1.0) -> Recipe:
    """Logit-normal draws, weight 1. Source: Esser et al. 2024, arXiv:2403.03206.

    Args:
        mean: see the density `logit_normal`.
        std: see the density `logit_normal`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> build_policy("logit_normal", NoiseSchedule.rectified_flow(4)).density.round(decimals=3).tolist()
        [0.136, 0.364, 0.364, 0.136]
    """
    return {"density": {"type": "logit_normal", "mean": mean, "std": std}, "weighting": {"type": "constant"}}


def clts(*, mean: float = 0.3, std: float = 0.25, curriculum_steps: int = 50_000) -> Recipe:
    """Uniform draws that turn into a Gaussian over timesteps. Source: Xu et al. 2024, arXiv:2404.07946.

    Args:
        mean: see `Curriculum`.
        std: see `Curriculum`.
        curriculum_steps: see `Curriculum`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy({"type": "clts", "curriculum_steps": 100}, NoiseSchedule.linear(1000))
        >>> policy.advance(100)
        >>> int(policy.density.argmax())
        300
    """
    return {
        "density": {"type": "clts", "mean": mean, "std": std, "curriculum_steps": curriculum_steps},
        "weighting": {"type": "constant"},
    }


def loss_second_moment(*, history: int = 10, uniform_floor: float = 0.001) -> Recipe:
    """IDDPM's importance sampling: draws follow the losses, weights keep the mean loss unbiased.

    The weight multiplies the whole loss. Source: Nichol & Dhariwal 2021, arXiv:2102.09672.

    Args:
        history: see `LossSecondMoment`.
        uniform_floor: see `LossSecondMoment`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy("loss_second_moment", NoiseSchedule.linear(1000))
        >>> policy.scope, round(policy.mean_weight, 6)  # uniform until every timestep has 10 losses
        ('loss', 1.0)
    """
    return {
        "density": {"type": "loss_second_moment", "history": history, "uniform_floor": uniform_floor},
        "weighting": {"type": "inverse_density"},
        "scope": "loss",
    }


for _recipe in (uniform, p2, min_snr, logit_normal, clts, loss_second_moment):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
