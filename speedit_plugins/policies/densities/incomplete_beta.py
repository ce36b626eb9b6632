"""The Beta law's tails. torch has no incomplete beta function.

Dims: E values.
"""

import math

import torch
from torch import Tensor

_MAX_TERMS = 10_000


def beta_tails(x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Mass of Beta(a, b) below x and above it, shapes (E,) float64.

    Source: the continued fraction of the regularised incomplete beta function, NIST DLMF 8.17.22.

    Args:
        x: values in [0, 1], shape (E,) float64.
        a: first shape parameter, > 0.
        b: second shape parameter, > 0.

    Raises:
        ValueError: a and b are so large that the continued fraction does not converge.

    Example:
        >>> below, above = beta_tails(torch.tensor([0.5], dtype=torch.float64), 1.0, 2.0)
        >>> below.round(decimals=12).tolist(), above.round(decimals=12).tolist()
        ([0.75], [0.25])
    """
    # The fraction converges fast on the side of x where the smaller tail is.
    is_low = x < (a + 1) / (a + b + 2)
    tail = torch.empty_like(x)
    tail[is_low] = _lower_tail(x[is_low], a, b)
    tail[~is_low] = _lower_tail(1 - x[~is_low], b, a)
    return torch.where(is_low, tail, 1 - tail), torch.where(is_low, 1 - tail, tail)


def _lower_tail(x: Tensor, a: float, b: float) -> Tensor:
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    front = torch.exp(torch.xlogy(x.new_tensor(a), x) + b * torch.log1p(-x) - log_beta) / a
    return front / _fraction(x, a, b)


def _fraction(x: Tensor, a: float, b: float) -> Tensor:
    """1 + d_1 / (1 + d_2 / (1 + ...)) by Lentz's method: the ratio of two convergents is multiplied on."""
    value = numerator = torch.ones_like(x)
    denominator = torch.zeros_like(x)
    for term in range(1, _MAX_TERMS):
        m = term // 2
        factor = -(a + m) * (a + b + m) if term % 2 else m * (b - m)
        d = factor * x / ((a + term - 1) * (a + term))
        denominator = 1 / (1 + d * denominator)
        numerator = 1 + d / numerator
        ratio = numerator * denominator
        value = value * ratio
        if bool(((ratio - 1).abs() < 1e-15).all()):
            return value
    raise ValueError(f"beta needs smaller a and b, got {a:g} and {b:g}: its density is too narrow to compute")
