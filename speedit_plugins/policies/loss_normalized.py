"""Weights that follow the measured loss, so that what is minimised stays at about 1.

A constant factor of a loss cancels in Adam's step. A loss that falls does not: the second moment remembers
about 1 / (1 - beta2) steps, and its large gradients from the beginning shorten all steps until they are
forgotten. Divided by its own running mean, the loss keeps its size, and the steps theirs.

Dims: T timesteps, B batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from speedit_plugins.policies.densities import AdaptiveDensity, Density
from speedit_plugins.policies.distributed import gather_losses
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule


class LossNormalizedPolicy(TimestepPolicy):
    """A policy whose weights are divided by the running mean of weight * loss, over the ranks.

    The loss is what `update` is told. Until the first one the weights are those of the tables. Losses that
    are not finite, or all 0, are not seen.

    Args:
        schedule: as of every policy, like `density`, `weighting` and the options.
        loss_decay: share of the running mean that an update keeps, in [0, 1).

    Raises:
        ValueError: `loss_decay` out of range, or what every policy refuses.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        density: Density | AdaptiveDensity,
        weighting: Callable[[Tensor], Tensor],
        *,
        loss_decay: float = 0.95,
        **options: Any,
    ) -> None:
        if not 0 <= loss_decay < 1:
            raise ValueError(f"loss_decay needs to lie in [0, 1), got {loss_decay}")
        self._loss_decay = loss_decay
        self._mean_loss: float | None = None
        super().__init__(schedule, density, weighting, **options)

    def update(self, index: Tensor, loss: Tensor) -> None:
        """Learns from the unweighted losses (B,) of a step at their indices (B,); a host sync."""
        rows = gather_losses(index, loss).double()
        mean = float((self._relative[rows[:, 0].long()] * rows[:, 1]).mean())
        # NaN of no rows.
        if mean > 0:
            before = mean if self._mean_loss is None else self._mean_loss
            self._mean_loss = self._loss_decay * before + (1 - self._loss_decay) * mean
        super().update(index, loss)
        self._scale()

    def state_dict(self) -> dict[str, Any]:
        """As of every policy, with the running mean."""
        return {**super().state_dict(), "mean_loss": self._mean_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            ValueError: the state belongs to another policy or T, or to one without `normalize="loss"`.
        """
        super().load_state_dict(state)
        self._mean_loss = state["mean_loss"]
        self._scale()

    def _rebuild(self) -> None:
        super()._rebuild()
        self._relative = self.weight
        self._scale()

    def _scale(self) -> None:
        self.weight = self._relative / (self._mean_loss or 1.0)
        weight = self.weight.float()
        self._tables = {
            device: dataclasses.replace(tables, weight=weight.to(device))
            for device, tables in self._tables.items()
        }
