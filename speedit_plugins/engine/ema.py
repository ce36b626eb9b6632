"""Exponential moving average of the trained weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Ema:
    """fp32 moving average of every trained parameter.

    Args:
        model: its parameters that require a gradient are averaged; frozen ones and buffers are not copied.
        halflife_steps: updates after which a weight counts half; > 0. DiT's decay 0.9999 is 6931.
        ramp: begin with the shorter memory (1 + n) / (10 + n) after n updates, so that early averages do not
            hold the initialisation. Source: TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def __init__(self, model: nn.Module, *, halflife_steps: float, ramp: bool = True) -> None:
        if not halflife_steps > 0:
            raise ValueError(f"ema needs halflife_steps > 0, got {halflife_steps}")
        self._decay = 0.5 ** (1 / halflife_steps)
        self._ramp = ramp
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {
            name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()
        }
        self.num_updates = 0

    @property
    def decay(self) -> float:
        """Share of the average that the next update keeps, in (0, 1)."""
        n = self.num_updates
        return min(self._decay, (1 + n) / (10 + n)) if self._ramp else self._decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current parameters."""
        current = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - self.decay)
        self.num_updates += 1

    def load(self, weights: Mapping[str, Tensor], num_updates: int) -> None:
        """Restores averaged weights (entries of other names are ignored) and the number of updates."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
        self.num_updates = num_updates

    def state_dict(self, model: nn.Module) -> dict[str, Any]:
        """The model's state dict with the averages in place of the trained parameters."""
        return {**model.state_dict(), **self.weights}
