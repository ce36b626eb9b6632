"""Weights divided by the measured loss, so that the minimised loss stays near 1.

Adam divides each step by the root of its second moment. A constant factor of the loss therefore cancels. A
falling loss does not: the second moment averages about 1 / (1 - beta2) steps, so the large gradients of the
first steps shorten the steps that follow. A loss divided by its own running mean keeps its size, and the
steps keep their length.

Dims: T timesteps, B batch.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.learned import AdaptiveWeighting


class LossNormalizedPolicy(TimestepPolicy):
    """A policy whose weights are divided by the running mean of weight * loss over all ranks.

    The losses come from `update`. Before the first update the divisor is 1. Losses that are not finite are
    ignored, and so is an update in which all losses are 0. A config asks for this class with
    `normalize: loss`.

    Args:
        schedule: the noise schedule.
        density: as for `TimestepPolicy`.
        weighting: as for `TimestepPolicy`.
        loss_decay: share of the running mean that an update keeps, in [0, 1).
        options: as for `TimestepPolicy`.

    Raises:
        ValueError: `loss_decay` out of range, a density that may differ between ranks, or what
            `TimestepPolicy` refuses.

    Example:
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> import torch
        >>> policy = build_policy({"type": "uniform", "normalize": "loss"}, NoiseSchedule.cosine(3))
        >>> policy.update(torch.tensor([0, 1, 2]), torch.tensor([4.0, 4.0, 4.0]))
        >>> policy.weight.tolist()
        [0.25, 0.25, 0.25]
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        density: Density | AdaptiveDensity,
        weighting: Callable[[Tensor], Tensor] | AdaptiveWeighting,
        *,
        loss_decay: float = 0.95,
        **options: Any,
    ) -> None:
        if not 0 <= loss_decay < 1:
            raise ValueError(f"loss_decay needs to be in [0, 1), got {loss_decay}")
        if isinstance(density, AdaptiveDensity) and density.differs_by_rank:
            raise ValueError(
                "normalize: loss needs one law on all ranks, and a shift by resolution may differ: take a"
                " number for the shift, or normalize: true"
            )
        self._loss_decay = loss_decay
        self._mean_loss: float | None = None
        super().__init__(schedule, density, weighting, **options)

    @property
    def learns(self) -> bool:
        """Always: the divisor follows the losses."""
        return True

    def _learn(self, index: Tensor, loss: Tensor) -> None:
        mean = float((self._relative[index] * loss).mean())
        # The mean of no losses is NaN, and NaN > 0 is false.
        if mean > 0:
            before = mean if self._mean_loss is None else self._mean_loss
            self._mean_loss = self._loss_decay * before + (1 - self._loss_decay) * mean
        super()._learn(index, loss)
        self._scale()

    def state_dict(self) -> dict[str, Any]:
        """The state of every policy, and the running mean."""
        return {**super().state_dict(), "mean_loss": self._mean_loss}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state is from another policy, another T, or a policy without `normalize="loss"`.
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
