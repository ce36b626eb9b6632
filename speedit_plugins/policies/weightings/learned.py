"""Weights that follow the losses of the training.

Dims: T timesteps, N losses.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.loss_profile import LossProfile, ProfiledTable
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import WEIGHTINGS


class AdaptiveWeighting(ABC):
    """A weighting that changes during training, beside `AdaptiveDensity`. A config builds it by its name."""

    @abstractmethod
    def weight(self, density: Tensor) -> Tensor:
        """The current weights (T,) for the density table (T,)."""

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Learns from the losses of all ranks, float64 (N,), finite, at the indices (N,), both on the CPU.

        True if the weights changed.
        """
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state as plain values and tensors, for `load_state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class Uncertainty(AdaptiveWeighting):
    """EDM2's weights: every noise level contributes the same to the loss, 1 / E[loss at this log-SNR].

    EDM2 trains a small network u(log-SNR) along with the model, on loss / e^u + u. Its gradient in u is zero
    where e^u is the expected loss. Here e^u is the running mean of a `LossProfile`, which has the same fixed
    point and needs no learning rate, no network and no optimizer of its own. The mean weighted loss is about
    1 at each noise level. Weights are 1 until there is a profile.
    Source: Karras et al. 2024, arXiv:2312.02696, after Kendall et al. 2018, arXiv:1705.07115.

    The prediction type does not matter: an error times a factor, divided by its own mean, has lost the
    factor. A host's variational term is part of the mean, and is not weighted.

    Args:
        max_ratio: largest weight over the smallest one, >= 1. A model of epsilon that has learned pure noise
            would otherwise weigh its noisiest timesteps by 10^4 and more.
        refresh_updates: updates from one table to the next, >= 1.
        num_bins: see `LossProfile`.
        window: see `LossProfile`.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> learned = Uncertainty(NoiseSchedule.cosine(2), refresh_updates=1)
        >>> learned.update(torch.tensor([0, 1]).repeat(8), torch.tensor([0.5, 0.1]).double().repeat(8))
        True
        >>> learned.weight(torch.tensor([0.5, 0.5])).round(decimals=6).tolist()
        [2.0, 10.0]
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        max_ratio: float = 1000.0,
        refresh_updates: int = 8,
        num_bins: int = 40,
        window: int = 512,
    ) -> None:
        if not max_ratio >= 1:
            raise ValueError(f"uncertainty needs max_ratio >= 1, got {max_ratio}")
        self._max_ratio = max_ratio
        profile = LossProfile(schedule, num_bins=num_bins, window=window)
        self._learned = ProfiledTable(
            profile, torch.ones_like(schedule.alpha), self._inverse, refresh_updates
        )

    def _inverse(self, loss: Tensor) -> Tensor:
        return 1 / loss.clamp(min=float(loss.max()) / self._max_ratio)

    def weight(self, density: Tensor) -> Tensor:
        return self._learned.table

    def update(self, index: Tensor, loss: Tensor) -> bool:
        return self._learned.update(index, loss)

    def state_dict(self) -> dict[str, Any]:
        return self._learned.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned.load_state_dict(state)


WEIGHTINGS.register_module(name="uncertainty", module=Uncertainty)
