"""Policies that take their noise levels from the data."""

from speedit_plugins.policies.recipes.recipe import Recipe
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.conversion import usual_prediction_type
from speedit_plugins.registry import POLICIES


def spectral(
    *,
    mean: float | None = None,
    offset: float = 0.6,
    std: float = 2.2,
    clean_std: float | None = 1.1,
    clean_share: float = 0.15,
) -> Recipe:
    """Draws log-SNR around the point where half of the data's variance is explained, P2 weights.

    Draws are stratified, and the weights have mean 1. Source: docs/method.md.

    Args:
        mean: log-SNR of that point. None measures it on the data, if `build_policy` gets a `data_spectrum`.
        offset: distance from `mean` to the centre of the draws. Above 0 is cleaner.
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
        "offset": offset,
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
    offset: float = 0.4,
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
    return spectral(mean=mean, offset=offset, std=std, clean_std=clean_std, clean_share=clean_share)


def spectral_flow(
    *,
    mean: float | None = None,
    slope: float = 0.5,
    offset: float = 1.0,
    std: float = 2.0,
    clean_std: float | None = None,
    clean_share: float = 0.0,
) -> Recipe:
    """`spectral` for rectified flows: the same arguments and a slope, weight 1. Source: docs/method.md.

    With the default widths this is `logit_normal` in strata, of mean -(`slope` * `mean` + `offset`) / 2 and
    std 1: the law that trainers of flows draw from, put where the data want it. A flow is sampled down to
    t = 0, so clean timesteps keep their weight.

    Args:
        mean: see `spectral`.
        slope: change of the centre of the draws for each unit of `mean`, finite.
        offset: added to `slope` * `mean`. Above 0 is cleaner.
        std: see `spectral`.
        clean_std: see `spectral`.
        clean_share: see `spectral`.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy = build_policy({"type": "spectral_flow", "mean": 0.0}, NoiseSchedule.rectified_flow(1000))
        >>> policy.stratified, policy.mean_weight
        (True, 1.0)
    """
    recipe = spectral(mean=mean, offset=offset, std=std, clean_std=clean_std, clean_share=clean_share)
    return {**recipe, "density": {**recipe["density"], "slope": slope}, "weighting": {"type": "constant"}}


# The recipe whose law and weights `auto` takes, by what the model predicts.
_RECIPES = {
    "epsilon": spectral,
    "clamped epsilon": spectral_fast,
    "x0": spectral,
    "v": spectral,
    "flow": spectral_flow,
}


def auto(
    schedule: NoiseSchedule,
    prediction_type: str | None = None,
    *,
    mean: float | None = None,
    clamped: bool = False,
    num_samples: int | None = None,
    follow: bool = False,
) -> Recipe:
    """The spectral policy that suits the model, centred by the data of the first training steps.

    `spectral_flow` for a flow; `spectral_fast` for epsilon if the sampler clamps x_0; `spectral` for any
    other model. For x0 the weights of epsilon are converted.
    Source: docs/method.md.

    Args:
        mean: the centre, if it is known. None measures it, see `CentredByData`.
        clamped: whether the sampler clamps x_0. It matters for a model of epsilon only.
        num_samples: see `CentredByData`.
        follow: let the centre follow the model's losses, see `CentredByData`.

    Raises:
        ValueError: `clamped` for another model than one of epsilon; or no `prediction_type` on a schedule
            that does not tell it.

    Example:
        >>> from speedit_plugins import build_policy
        >>> policy = build_policy("auto", NoiseSchedule.rectified_flow(1000))
        >>> policy.needs_data
        True
        >>> import torch
        >>> samples = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0))
        >>> policy.observe(samples)  # says on stderr what it found
        >>> policy.needs_data
        False
    """
    predicted = prediction_type or usual_prediction_type(schedule)
    if clamped and predicted != "epsilon":
        raise ValueError(f"auto: clamped has no effect on a model of {predicted}: leave it out")
    recipe = _RECIPES["clamped epsilon" if clamped else predicted]()
    law = {key: value for key, value in recipe["density"].items() if key not in ("type", "mean")}
    density = {"type": "auto", "mean": mean, "num_samples": num_samples, "follow": follow, "law": law}
    recipe = {**recipe, "density": density}
    return {**recipe, "equivalent_to": "epsilon"} if predicted == "x0" else recipe


for _recipe in (spectral, spectral_fast, spectral_flow, auto):
    POLICIES.register_module(name=_recipe.__name__, module=_recipe)
