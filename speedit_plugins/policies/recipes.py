"""The named policies. Each recipe returns a config of parts: a density, a weighting, and a way to draw.

`build_policy("speed", schedule)` and `build_policy(recipes.speed(), schedule)` are the same policy. A config
may override a recipe's `stratified` and `normalize`.
"""

from typing import Any

from speedit_plugins.policies.schedule import CONVERGENCE_SNR, NoiseSchedule
from speedit_plugins.registry import POLICIES

Recipe = dict[str, Any]


def uniform() -> Recipe:
    """Uniform draws, weight 1: ordinary diffusion training.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> print(build_policy("uniform", NoiseSchedule.linear(1000)))
        uniform: no boundary of 1000 timesteps, mean weight 1.0000
    """
    return {"density": {"type": "uniform"}, "weighting": {"type": "constant"}}


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


def spectral(
    *,
    mean: float | None = None,
    shift: float = 0.6,
    std: float = 2.2,
    clean_std: float | None = 1.1,
    clean_share: float = 0.15,
) -> Recipe:
    """Draws log-SNR around the point where half of the data's variance is explained, P2 weights.

    Draws are stratified, and the weights have mean 1. Source: docs/method.md.

    Args:
        mean: log-SNR of that point. None measures it on the data, if `build_policy` gets a `data_spectrum`.
        shift: distance from `mean` to the centre of the draws. Above 0 is cleaner.
        std: standard deviation of log-SNR on the side noisier than the centre, > 0.
        clean_std: standard deviation of log-SNR on the cleaner side, > 0. None takes `std`.
        clean_share: share of the draws, in [0, 1), spread evenly over the timesteps cleaner than the centre.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy({"type": "spectral", "mean": 0.0}, NoiseSchedule.linear(1000))
        >>> policy.stratified, round(policy.mean_weight, 6)
        (True, 1.0)
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
        # The weights average 0.2. The variational bound of a learned variance is not weighted, so without
        # normalisation it would count five times as much as the squared error.
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
    """A narrower `spectral` with the same arguments. Faster, with one condition. Source: docs/method.md.

    Use it only with a sampler that clamps x_0, a model that predicts v, or a schedule that ends before pure
    noise. The noisiest timesteps are hardly ever drawn, so a model of epsilon does not learn them, and
    sampling through them without a clamp fails.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> schedule = NoiseSchedule.linear(1000)
        >>> policy = build_policy({"type": "spectral_fast", "mean": 0.0}, schedule)
        >>> bool(policy.density[schedule.log_snr < -4].sum() < 1e-9)
        True
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
    """`spectral` for rectified flows: the same arguments, weight 1. Source: docs/method.md.

    A flow is sampled down to t = 0, so clean timesteps keep their weight. The noisy side is narrower than
    that of `spectral`: x_0 is computed without dividing by alpha, so errors at high noise are not amplified.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy({"type": "spectral_flow", "mean": 0.0}, NoiseSchedule.rectified_flow(1000))
        >>> policy.stratified, policy.mean_weight
        (True, 1.0)
    """
    recipe = spectral(mean=mean, shift=shift, std=std, clean_std=clean_std, clean_share=clean_share)
    return {**recipe, "weighting": {"type": "constant"}}


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
