"""The average of the trained weights that a config asks for, and the exponential one."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from speedit_plugins.trainer.config.sections import EmaConfig
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.training.averages.power_averages import PowerAverages


class Average(Protocol):
    """An average of this rank's slice of every trained parameter.

    `slices` are what samples are drawn with, empty if no average is kept; `others` are further averages by
    their label.
    """

    slices: dict[str, Slice]
    others: dict[str, dict[str, Slice]]
    num_updates: int

    def update(self) -> None: ...
    def load(
        self,
        weights: Mapping[str, Tensor],
        num_updates: int,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None: ...


def build_average(options: EmaConfig, slices: Mapping[str, Slice]) -> Average:
    """The average of `ema.type`. It begins with the current weights.

    Args:
        slices: views of the float32 master weights, by parameter name.
    """
    if options.type == "none":
        return NoAverage()
    if options.type == "power":
        return PowerAverages(slices, sigma_rels=options.sigma_rel)
    return Ema(slices, halflife_steps=options.halflife_steps, ramp=options.ramp)


class NoAverage:
    """Keeps nothing. The trainer updates no average without slices."""

    def __init__(self) -> None:
        self.slices: dict[str, Slice] = {}
        self.others: dict[str, dict[str, Slice]] = {}
        self.num_updates = 0

    def update(self) -> None:
        """Does nothing."""

    def load(
        self,
        weights: Mapping[str, Tensor],
        num_updates: int,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Restores the number of updates."""
        self.num_updates = num_updates


class Ema:
    """float32 moving average of this rank's slice of every trained parameter.

    Args:
        slices: views of the float32 master weights, by parameter name.
        halflife_steps: updates after which a weight counts half; > 0. DiT's decay 0.9999 is 6931.
        ramp: limit the decay to (1 + n) / (10 + n) after n updates, so that early averages forget the
            initialisation. Source: TensorFlow's ExponentialMovingAverage(num_updates).
    """

    def __init__(self, slices: Mapping[str, Slice], *, halflife_steps: float, ramp: bool = True) -> None:
        if not halflife_steps > 0:
            raise ValueError(f"ema needs halflife_steps > 0, got {halflife_steps}")
        self._decay = 0.5 ** (1 / halflife_steps)
        self._ramp = ramp
        self._current = [part.values for part in slices.values()]
        self.slices = {name: Slice(part.start, part.values.clone()) for name, part in slices.items()}
        self.others: dict[str, dict[str, Slice]] = {}
        self._averages = [part.values for part in self.slices.values()]
        self.num_updates = 0

    @property
    def decay(self) -> float:
        """Share of the average that the next update keeps, in (0, 1)."""
        n = self.num_updates
        return min(self._decay, (1 + n) / (10 + n)) if self._ramp else self._decay

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the current parameters."""
        torch._foreach_lerp_(self._averages, self._current, 1 - self.decay)
        self.num_updates += 1

    def load(
        self,
        weights: Mapping[str, Tensor],
        num_updates: int,
        others: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Restores from whole averaged tensors and the number of updates. Other names are ignored."""
        for name, part in self.slices.items():
            part.values.copy_(weights[name].reshape(-1)[part.start : part.start + len(part.values)])
        self.num_updates = num_updates
