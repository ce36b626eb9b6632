"""The named policies: each is a density, a weighting and a draw, written as the config that composes them.

`build_policy("speed", schedule)` and `build_policy(recipes.speed(), schedule)` draw and weigh alike. What a
recipe says of `stratified` and `normalize` holds unless the config says otherwise.
"""

from typing import Any

from speedit_plugins.policies.schedule import CONVERGENCE_SNR, NoiseSchedule
from speedit_plugins.registry import POLICIES

Recipe = dict[str, Any]


def uniform() -> Recipe:
    """Ordinary diffusion training."""
    return {"density": {"type": "uniform"}, "weighting": {"type": "constant"}}


def speedit(
    *,
    threshold: float = 0.1,
    sharpness: float = 1000.0,
    gamma: float = 1.0,
    k: float = 1.0,
) -> Recipe:
    """SpeeDiT: asymmetric density with half its mass reflected, P2 weights. Source: the SpeeDiT README."""
    return {
        "density": {"type": "asymmetric", "threshold": threshold, "sharpness": sharpness},
        "weighting": {"type": "p2", "gamma": gamma, "k": k},
    }


def speedit_reference(*, threshold: float = 0.1) -> Recipe:
    """SpeeDiT as published: the reflections fill the second half of each batch."""
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
    """SpeeD: convergence area k times rarer, weights by change. Wang et al. 2024, arXiv:2405.17403."""
    return {
        "density": {"type": "thinned", "k": k, "snr_boundary": snr_boundary, "tau": tau},
        "weighting": {"type": "change_aware", "lam": lam},
    }


def speed_reference(
    schedule: NoiseSchedule, *, k: float = 5.0, lam: float = 0.6, tau: int | None = None
) -> Recipe:
    """SpeeD as released: tau = 0.7 T, weight 1 from tau on, draws paired at SpeeDiT's pivot, not at tau."""
    boundary = max(1, round(0.7 * schedule.num_timesteps)) if tau is None else tau
    return {
        "density": {"type": "thinned", "k": k, "tau": boundary},
        "weighting": {"type": "change_aware", "lam": lam, "tau": boundary, "beyond": 1.0},
        "draw": {"type": "paired"},
    }


def open_sora_speed() -> Recipe:
    """Open-Sora's vendored `iddpm-speed`: density switch at 0.1 per u, pairing around the 0.05 crossing."""
    return {
        "density": {"type": "asymmetric", "reflected": False},
        "weighting": {"type": "p2"},
        "draw": {"type": "paired", "threshold": 0.05},
    }


def spectral(
    *,
    mean: float | None = None,
    shift: float = 0.6,
    std: float = 2.2,
    clean_std: float | None = 1.1,
    clean_share: float = 0.15,
) -> Recipe:
    """log-SNR drawn about where half of the data's variance is explained. Source: docs/method.md.

    Args:
        mean: log-SNR of that point; None is measured where the data are at hand, as the trainer does.
        shift: from `mean` to the centre of the draws; above 0 is cleaner.
        std: of log-SNR on the side noisier than the centre, > 0.
        clean_std: of the cleaner side, > 0, whatever `std` is; None is `std`.
        clean_share: of the draws, spread evenly over the timesteps cleaner than the centre; in [0, 1).
    """
    normal = {
        "type": "log_snr_normal",
        "mean": mean,
        "shift": shift,
        "std": std,
        "clean_std": clean_std,
        "clean_share": clean_share,
    }
    return {
        "density": normal,
        "weighting": {"type": "p2", "gamma": 0.8, "k": 5.0},
        "stratified": True,
        # The weights are 0.2 on average: a learned variance's bound, which has none, would count for five.
        "normalize": True,
    }


def spectral_fast(
    *,
    mean: float | None = None,
    shift: float = 0.4,
    std: float = 0.7,
    clean_std: float | None = None,
    clean_share: float = 0.2,
) -> Recipe:
    """A narrow `spectral`, with the same arguments. Source: docs/method.md.

    For samplers that clamp x_0, models of v, and schedules that stop short of pure noise: a model of epsilon
    learns nothing of the noisiest timesteps, and sampling through them without a clamp is useless.
    """
    return spectral(mean=mean, shift=shift, std=std, clean_std=clean_std, clean_share=clean_share)


def spectral_flow(
    *,
    mean: float | None = None,
    shift: float = 0.6,
    std: float = 1.6,
    clean_std: float | None = 2.2,
    clean_share: float = 0.15,
) -> Recipe:
    """`spectral` for rectified flows, with the same arguments and weights of 1. Source: docs/method.md.

    The weights of `spectral` take from a flow the clean end that it ends at; its model needs no long noisy
    side, since x_0 is read from it without dividing by what is left of the signal.
    """
    recipe = spectral(mean=mean, shift=shift, std=std, clean_std=clean_std, clean_share=clean_share)
    return {**recipe, "weighting": {"type": "constant"}}


def p2(*, gamma: float = 1.0, k: float = 1.0) -> Recipe:
    """Uniform draws, P2 weights. Source: Choi et al. 2022, arXiv:2204.00227."""
    return {"density": {"type": "uniform"}, "weighting": {"type": "p2", "gamma": gamma, "k": k}}


def min_snr(*, gamma: float = 5.0) -> Recipe:
    """Uniform draws, Min-SNR weights. Source: Hang et al. 2023, arXiv:2303.09556."""
    return {"density": {"type": "uniform"}, "weighting": {"type": "min_snr", "gamma": gamma}}


def logit_normal(*, mean: float = 0.0, std: float = 1.0) -> Recipe:
    """Logit-normal draws, weight 1. Source: Esser et al. 2024, arXiv:2403.03206."""
    return {"density": {"type": "logit_normal", "mean": mean, "std": std}, "weighting": {"type": "constant"}}


def clts(*, mean: float = 0.3, std: float = 0.25, curriculum_steps: int = 50_000) -> Recipe:
    """Curriculum from uniform to a Gaussian over timesteps. Source: Xu et al. 2024, arXiv:2404.07946."""
    return {
        "density": {"type": "clts", "mean": mean, "std": std, "curriculum_steps": curriculum_steps},
        "weighting": {"type": "constant"},
    }


def loss_second_moment(*, history: int = 10, uniform_floor: float = 0.001) -> Recipe:
    """IDDPM's unbiased importance sampling. Source: Nichol & Dhariwal 2021, arXiv:2102.09672."""
    return {
        "density": {"type": "loss_second_moment", "history": history, "uniform_floor": uniform_floor},
        "weighting": {"type": "inverse_density"},
        "scope": "loss",
    }


for _recipe in (
    uniform,
    speedit,
    speedit_reference,
    speed,
    speed_reference,
    open_sora_speed,
    spectral,
    spectral_fast,
    spectral_flow,
    p2,
    min_snr,
    logit_normal,
    clts,
    loss_second_moment,
):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
