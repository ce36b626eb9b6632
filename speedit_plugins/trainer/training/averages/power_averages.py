"""Averages of the weights whose length grows with the training, and any length made of the kept ones.

A power average after t updates weighs the weights of update s by the integral over [s - 1, s] of its profile
p(s) = (gamma + 1) s^gamma / t^(gamma + 1). Source: Karras et al. 2024, arXiv:2312.02696, section 3 and
appendix C.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.trainer.config.sections import label
from speedit_plugins.trainer.parallel.master_weights import Slice


@dataclass(frozen=True)
class Profile:
    """A power average: its relative length, and the number of updates that it is over.

    Args:
        sigma_rel: standard deviation of the profile over `updates`, in (0, 1 / sqrt(12)).
        updates: > 0.
    """

    sigma_rel: float
    updates: int

    @property
    def gamma(self) -> float:
        """The profile's exponent, see `gamma_of`."""
        return gamma_of(self.sigma_rel)


class PowerAverages:
    """float32 power averages of this rank's slice of every trained parameter, one for each length.

    Args:
        slices: views of the float32 master weights, by parameter name.
        sigma_rels: the lengths; samples are drawn with the first.
    """

    def __init__(self, slices: Mapping[str, Slice], *, sigma_rels: Sequence[float]) -> None:
        self._current = [part.values for part in slices.values()]
        self.sigma_rels = tuple(sigma_rels)
        self._gammas = [gamma_of(sigma_rel) for sigma_rel in sigma_rels]
        kept = {
            label(sigma_rel): {name: Slice(part.start, part.values.clone()) for name, part in slices.items()}
            for sigma_rel in sigma_rels
        }
        self.slices = kept[label(sigma_rels[0])]
        self.others = {name: part for name, part in kept.items() if part is not self.slices}
        self.num_updates = 0

    def by_label(self) -> dict[str, dict[str, Slice]]:
        """Every average by the label of its length."""
        return {label(self.sigma_rels[0]): self.slices, **self.others}

    @torch.no_grad()
    def update(self) -> None:
        """Moves each average towards the current parameters; the first update copies them."""
        self.num_updates += 1
        for gamma, average in zip(self._gammas, self.by_label().values(), strict=True):
            kept = [part.values for part in average.values()]
            torch._foreach_lerp_(kept, self._current, 1 - kept_share(gamma, self.num_updates))

    def load(
        self,
        weights: Mapping[str, Tensor],
        num_updates: int,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Restores from whole averaged tensors and the number of updates.

        Args:
            weights: the first length; without `others` each length begins with them.
            num_updates: updates so far.
            others: every length by its label.
        """
        for name, average in self.by_label().items():
            whole = weights if others is None else others[name]
            for parameter, part in average.items():
                flat = whole[parameter].reshape(-1)
                part.values.copy_(flat[part.start : part.start + len(part.values)])
        self.num_updates = num_updates


def kept_share(gamma: float, update: int) -> float:
    """Share of the average that update number `update`, from 1 on, keeps: (1 - 1 / t)^(gamma + 1).

    Source: section 3.1 of the paper.
    """
    return float((1 - 1 / update) ** (gamma + 1))


def sigma_rel_of(gamma: float) -> float:
    """Standard deviation of the profile relative to the training's length, for gamma > -1.

    Source: section 3.1 of the paper.

    Example:
        >>> round(sigma_rel_of(0.0) * 12**0.5, 12)
        1.0
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The exponent gamma >= 0 of the profile with this standard deviation.

    Raises:
        ValueError: a length outside of (0, 1 / sqrt(12)), the standard deviation of a uniform average.
    """
    if not 0 < sigma_rel <= 1 / math.sqrt(12):
        raise ValueError(f"sigma_rel needs to be in (0, {1 / math.sqrt(12):.4f}], got {sigma_rel}")
    # sigma_rel falls with gamma, and is below 1 / (gamma + 2).
    low, high = 0.0, 1 / sigma_rel
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sigma_rel_of(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


def inner_product(one: Profile, other: Profile) -> float:
    """The integral of the product of two profiles over the updates that both cover.

    Source: algorithm 3 of the paper.
    """
    ratio = one.updates / other.updates
    exponent = other.gamma if ratio < 1 else -one.gamma
    longest = max(one.updates, other.updates)
    scale = (one.gamma + 1) * (other.gamma + 1) / ((one.gamma + other.gamma + 1) * longest)
    return float(scale * ratio**exponent)


def coefficients(kept: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """The linear combination of kept averages whose profile is nearest to the wanted one.

    Source: algorithm 3 of the paper, least squares.

    Returns:
        A coefficient for each kept average, and the distance of the profiles over the norm of the wanted one.

    Raises:
        ValueError: nothing is kept.
    """
    if not kept:
        raise ValueError("a power average needs kept averages to be made of, got none")
    gram = torch.tensor([[inner_product(a, b) for b in kept] for a in kept], dtype=torch.float64)
    shared = torch.tensor([inner_product(a, wanted) for a in kept], dtype=torch.float64)
    # Profiles of neighbouring snapshots are nearly equal. The scale makes their norms 1.
    scale = gram.diagonal().rsqrt()
    system = scale[:, None] * gram * scale
    found = scale * torch.linalg.lstsq(system, (scale * shared)[:, None], driver="gelsd").solution[:, 0]
    norm = inner_product(wanted, wanted)
    distance = found @ gram @ found - 2 * found @ shared + norm
    return found.tolist(), math.sqrt(max(0.0, float(distance)) / norm)
