"""The published policies: SpeeD's and SpeeDiT's, and the copies of them in the field."""

from speedit_plugins.policies.recipes.recipe import Recipe
from speedit_plugins.policies.schedule import CONVERGENCE_SNR, NoiseSchedule
from speedit_plugins.registry import POLICIES


def speedit(
    *,
    threshold: float = 0.1,
    sharpness: float = 1000.0,
    gamma: float = 1.0,
    k: float = 1.0,
) -> Recipe:
    """SpeeDiT: steep timesteps are drawn more often, half of the draws are reflected, P2 weights.

    Source: the SpeeDiT README.

    Args:
        threshold: see `asymmetric`.
        sharpness: see `asymmetric`.
        gamma: see the weighting `p2`.
        k: see the weighting `p2`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> print(build_policy("speedit", NoiseSchedule.linear(1000)))
        speedit: boundary 642 of 1000 timesteps, mean weight 0.5815
    """
    return {
        "density": {"type": "asymmetric", "threshold": threshold, "sharpness": sharpness},
        "weighting": {"type": "p2", "gamma": gamma, "k": k},
    }


def speedit_reference(*, threshold: float = 0.1) -> Recipe:
    """SpeeDiT as published: reflections fill the second half of each batch. Source: the SpeeDiT README.

    Args:
        threshold: slope per u, see `asymmetric` and `Paired`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy("speedit_reference", NoiseSchedule.linear(1000))
        >>> index = policy.draw(3).index  # two direct draws, and the reflection of the first at 642
        >>> bool(index[2] == abs(index[0] - 642))
        True
    """
    return {
        "density": {"type": "asymmetric", "threshold": threshold, "reflected": False},
        "weighting": {"type": "p2"},
        "draw": {"type": "paired", "threshold": threshold},
    }


def speed(
    *,
    k: float = 5.0,
    lam: float = 0.6,
    snr_boundary: float = CONVERGENCE_SNR,
    tau: int | None = None,
) -> Recipe:
    """SpeeD: the convergence area is drawn k times less often, weights follow the speed of change.

    Source: Wang et al. 2024, arXiv:2405.17403.

    Args:
        k: see `thinned`.
        lam: see `change_aware`.
        snr_boundary: see `thinned`.
        tau: see `thinned`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> print(build_policy({"type": "speed", "k": 5.0}, NoiseSchedule.linear(1000)))
        speed: boundary 700 of 1000 timesteps, mean weight 0.4965
    """
    return {
        "density": {"type": "thinned", "k": k, "snr_boundary": snr_boundary, "tau": tau},
        "weighting": {"type": "change_aware", "lam": lam},
    }


def speed_reference(
    schedule: NoiseSchedule, *, k: float = 5.0, lam: float = 0.6, tau: int | None = None
) -> Recipe:
    """SpeeD as released: tau is 0.7 T, the weight from tau on is 1, and draws are paired.

    The pairs are reflected at SpeeDiT's pivot, not at tau. Source: the code released with arXiv:2405.17403.

    Args:
        k: see `thinned`.
        lam: see `change_aware`.
        tau: first index of the convergence area, in (0, T]. None is 0.7 T, rounded.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> print(build_policy("speed_reference", NoiseSchedule.linear(1000)))
        speed_reference: boundary 700 of 1000 timesteps, mean weight 0.5282
    """
    boundary = max(1, round(0.7 * schedule.num_timesteps)) if tau is None else tau
    return {
        "density": {"type": "thinned", "k": k, "tau": boundary},
        "weighting": {"type": "change_aware", "lam": lam, "tau": boundary, "beyond": 1.0},
        "draw": {"type": "paired"},
    }


def open_sora_speed() -> Recipe:
    """Open-Sora's `iddpm-speed`: SpeeDiT's density, with draws paired where the slope falls below 0.05.

    Source: the scheduler `iddpm-speed` in Open-Sora.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> print(build_policy("open_sora_speed", NoiseSchedule.linear(1000)))
        open_sora_speed: boundary 642 of 1000 timesteps, mean weight 0.6158
    """
    return {
        "density": {"type": "asymmetric", "reflected": False},
        "weighting": {"type": "p2"},
        "draw": {"type": "paired", "threshold": 0.05},
    }


for _recipe in (speedit, speedit_reference, speed, speed_reference, open_sora_speed):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
