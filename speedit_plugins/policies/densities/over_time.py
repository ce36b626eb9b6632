"""Fixed densities over time. u = 0 is clean, u = 1 is noise; index i has the mass of [i / T, (i + 1) / T).

Dims: T timesteps.
"""

import math

import torch
from torch import Tensor

from speedit_plugins.policies.densities.cumulative import over_time
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.incomplete_beta import beta_tails
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DENSITIES


def uniform(schedule: NoiseSchedule) -> Density:
    """Every index is equally likely.

    Example:
        >>> uniform(NoiseSchedule.cosine(4)).table.tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return Density(torch.ones_like(schedule.alpha), is_relative=True)


def logit_normal(schedule: NoiseSchedule, *, mean: float = 0.0, std: float = 1.0) -> Density:
    """Density in which logit(u) is normal. Index i has the exact mass of its bin [i / T, (i + 1) / T).

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1. u = 1 is noise, so a positive mean is noisier.

    Args:
        mean: mean of logit(u), finite.
        std: standard deviation of logit(u), > 0.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> logit_normal(NoiseSchedule.rectified_flow(4)).table.round(decimals=3).tolist()
        [0.136, 0.364, 0.364, 0.136]
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"logit_normal needs a finite mean and std > 0, got {mean} and {std}")

    def tails(u: Tensor) -> tuple[Tensor, Tensor]:
        # erfc is accurate in the tails; torch's ndtr is 0 below -8.3.
        z = (torch.logit(u) - mean) / (std * math.sqrt(2))
        return torch.special.erfc(-z) / 2, torch.special.erfc(z) / 2

    return over_time(schedule, tails)


def mode(schedule: NoiseSchedule, *, scale: float = 1.29) -> Density:
    """Stable Diffusion 3's heavy-tailed law: u = 1 - v - scale (cos^2(pi v / 2) - 1 + v) with v uniform.

    v is in [0, 1]. The law is symmetric about u = 1/2, and its density stays above 0 at both ends.
    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1. 1.29 is the default of diffusers and kohya.

    Args:
        scale: in [-1, 2 / (pi - 2)], about 1.75. Above 0 the middle is drawn more often, below 0 the ends.

    Raises:
        ValueError: `scale` out of range: u would not be monotone in v.

    Example:
        >>> mode(NoiseSchedule.rectified_flow(4)).table.round(decimals=3).tolist()
        [0.134, 0.366, 0.366, 0.134]
    """
    largest = 2 / (math.pi - 2)
    if not -1 <= scale <= largest:
        raise ValueError(f"mode needs scale in [-1, 2 / (pi - 2) = {largest:.4f}], got {scale}")

    def v_at(u: Tensor) -> Tensor:
        """The v of each u, by bisection: u falls with v. 60 halvings reach the last bit."""
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(60):
            middle = (low + high) / 2
            is_above = 1 - middle - scale * (torch.cos(math.pi * middle / 2) ** 2 - 1 + middle) > u
            low, high = torch.where(is_above, middle, low), torch.where(is_above, high, middle)
        return (low + high) / 2

    # u falls with v, so v is the mass above u. The law is symmetric.
    return over_time(schedule, lambda u: (v_at(1 - u), v_at(u)))


def cosmap(schedule: NoiseSchedule) -> Density:
    """Density 2 / (pi (1 - 2u + 2u^2)): on a straight path, the noise levels of the cosine schedule.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1. The weighting `cosmap` is the same function.

    Example:
        >>> cosmap(NoiseSchedule.rectified_flow(4)).table.round(decimals=3).tolist()
        [0.205, 0.295, 0.295, 0.205]
    """
    return over_time(
        schedule, lambda u: (2 / math.pi * torch.atan2(u, 1 - u), 2 / math.pi * torch.atan2(1 - u, u))
    )


def beta(schedule: NoiseSchedule, *, a: float = 0.8, b: float = 1.0) -> Density:
    """u follows the Beta law, p(u) ~ u^(a - 1) (1 - u)^(b - 1). u = 1 is noise, so b > a is cleaner.

    Source: the defaults are those of B-TTDM, Zheng et al. 2024 (ECCV, Beta-Tuned Timestep Diffusion Model).
    MixFlow, arXiv:2512.19311, is a = 1 and b = 2: its release draws u = 1 - sqrt(v) with v uniform. The paper
    counts time from the noise and calls the same law Beta(2, 1).

    Args:
        a: exponent of u plus 1, > 0. Below 1, clean timesteps are drawn more often than by uniform draws.
        b: exponent of 1 - u plus 1, > 0. Above 1, noisy timesteps are drawn less often.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> beta(NoiseSchedule.rectified_flow(4), a=1.0, b=2.0).table.round(decimals=4).tolist()
        [0.4375, 0.3125, 0.1875, 0.0625]
    """
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ValueError(f"beta needs a > 0 and b > 0, got {a} and {b}")
    return over_time(schedule, lambda u: beta_tails(u, a, b))


def u_shaped(schedule: NoiseSchedule, *, a: float = 4.0) -> Density:
    """Both ends more often than the middle: p(u) ~ exp(a u) + exp(a (1 - u)).

    It is for the second training of a rectified flow, on pairs of noise and generated data.
    Source: Lee et al. 2024, arXiv:2405.20320; the release trains with a = 4. The release draws
    from exp(a u) and reflects half of the draws. Without the reflection, exp(a u) + exp(-a u) would rise
    all the way from 0 to 1.

    Args:
        a: how much more often the ends are drawn, > 0: exp(a) + 1 against 2 exp(a / 2) in the middle.

    Raises:
        ValueError: `a` out of range.

    Example:
        >>> u_shaped(NoiseSchedule.rectified_flow(4)).table.round(decimals=3).tolist()
        [0.338, 0.162, 0.162, 0.338]
    """
    if not 0 < a < math.inf:
        raise ValueError(f"u_shaped needs a > 0, got {a}")

    def below(u: Tensor) -> Tensor:
        # Half of the mass rises from u = 0 and half falls from it. Neither form overflows for a large a.
        falling = torch.expm1(-a * u)
        return (falling + torch.exp(a * (u - 1)) * falling) / (2 * math.expm1(-a))

    return over_time(schedule, lambda u: (below(u), below(1 - u)))


DENSITIES.register_module(name="uniform", module=uniform)
DENSITIES.register_module(name="logit_normal", module=logit_normal)
DENSITIES.register_module(name="mode", module=mode)
DENSITIES.register_module(name="cosmap", module=cosmap)
DENSITIES.register_module(name="beta", module=beta)
DENSITIES.register_module(name="u_shaped", module=u_shaped)
