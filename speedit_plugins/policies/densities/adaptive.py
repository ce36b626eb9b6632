"""Densities that change during training: a curriculum over the steps, and one that follows the losses.

Such a density is an object. `density()` returns the probabilities for now, and `update` and `advance` change
them.

Dims: T timesteps, B batch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DENSITIES


class AdaptiveDensity(ABC):
    """A density that changes during training. `observe`, `update` and `advance` return whether it changed."""

    @property
    def needs_data(self) -> bool:
        """Whether the density depends on what `observe` sees."""
        return False

    @property
    def is_ready(self) -> bool:
        """Whether timesteps can be drawn: false if the density needs data and has seen none."""
        return True

    @property
    def differs_by_rank(self) -> bool:
        """Whether ranks may have different densities, as each observes its own data."""
        return False

    @property
    def needs_every_timestep(self) -> bool:
        """Whether the density changes only after losses of every timestep."""
        return False

    @property
    def learns(self) -> bool:
        """Whether `update` changes the density."""
        return type(self).update is not AdaptiveDensity.update

    @property
    def follows_steps(self) -> bool:
        """Whether `advance` changes the density."""
        return type(self).advance is not AdaptiveDensity.advance

    @abstractmethod
    def density(self) -> Density:
        """The current density."""

    def observe(self, data: Tensor) -> bool:
        """Sees the data (B, ...) of this rank that the next draw is for. True if the density changed."""
        return False

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Learns from the losses of all ranks, float64 (N,), finite, at the indices (N,), both on the CPU.

        True if the density changed.
        """
        return False

    def advance(self, step: int) -> bool:
        """Moves to this number of finished training steps, >= 0. True if the density changed."""
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The state as plain values and tensors, for `load_state_dict`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""


class Curriculum(AdaptiveDensity):
    """CLTS: draws are uniform at first, and end in a Gaussian over timesteps.

    p = (1 - c) / T + c N(t; mean T, std T), where c = min(1, step / curriculum_steps). The Gaussian is
    normalised over the T timesteps.
    Source: Xu et al. 2024, arXiv:2404.07946. `mean` follows the SpeeD release; choose `std` for your data.

    Args:
        mean: centre of the Gaussian as a fraction of T, in [0, 1].
        std: standard deviation of the Gaussian as a fraction of T, > 0.
        curriculum_steps: training steps until all draws come from the Gaussian, >= 1.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> curriculum = Curriculum(NoiseSchedule.cosine(4), curriculum_steps=100)
        >>> curriculum.advance(100)
        True
        >>> curriculum.density().table.round(decimals=2).tolist()
        [0.2, 0.41, 0.3, 0.08]
    """

    def __init__(
        self, schedule: NoiseSchedule, *, mean: float = 0.3, std: float = 0.25, curriculum_steps: int = 50_000
    ) -> None:
        if not (0 <= mean <= 1 and 0 < std < math.inf and curriculum_steps >= 1):
            got = f"{mean}, {std} and {curriculum_steps}"
            raise ValueError(f"clts needs mean in [0, 1], std > 0 and curriculum_steps >= 1, got {got}")
        T = schedule.num_timesteps
        t = torch.arange(T, dtype=torch.float64, device="cpu")
        self._gaussian = torch.softmax(-(((t - mean * T) / (std * T)) ** 2) / 2, dim=0)
        self._curriculum_steps = curriculum_steps
        self._step = 0

    def density(self) -> Density:
        c = min(1.0, self._step / self._curriculum_steps)
        return Density((1 - c) / len(self._gaussian) + c * self._gaussian)

    def advance(self, step: int) -> bool:
        before, self._step = self._step, step
        return min(before, self._curriculum_steps) != min(step, self._curriculum_steps)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._step = int(state["step"])


class LossSecondMoment(AdaptiveDensity):
    """Timesteps are drawn in proportion to the root mean square of their last losses.

    Draws are uniform until every timestep has `history` losses. A small share stays uniform for good.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3 (10 losses for each timestep).

    Args:
        history: number of losses kept for each timestep, >= 1.
        uniform_floor: share of the draws that stays uniform, in (0, 1].

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> learned = LossSecondMoment(NoiseSchedule.cosine(2), history=1, uniform_floor=0.1)
        >>> learned.update(torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
        True
        >>> learned.density().table.round(decimals=4).tolist()
        [0.275, 0.725]
    """

    def __init__(self, schedule: NoiseSchedule, *, history: int = 10, uniform_floor: float = 0.001) -> None:
        if history < 1 or not 0 < uniform_floor <= 1:
            raise ValueError(
                f"loss_second_moment needs history >= 1 and uniform_floor in (0, 1],"
                f" got {history} and {uniform_floor}"
            )
        self._floor = uniform_floor
        self._losses = schedule.alpha.new_zeros(schedule.num_timesteps, history)
        self._counts = torch.zeros_like(schedule.timesteps)

    @property
    def needs_every_timestep(self) -> bool:
        return True

    def density(self) -> Density:
        T, history = self._losses.shape
        if (self._counts < history).any():
            return Density(torch.ones_like(self._losses[:, 0]))
        root = (self._losses**2).mean(dim=1).sqrt()
        # If all losses are 0, no timestep is preferred: the draws are uniform.
        p = root / root.sum() if root.sum() > 0 else torch.full_like(root, 1 / T)
        return Density((1 - self._floor) * p + self._floor / T)

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Adds losses (N,) measured at the indices (N,).

        Returns:
            True if every timestep has its history, so that the density follows the losses.
        """
        for t, value in zip(index.tolist(), loss.tolist(), strict=True):
            self._losses[t, self._counts[t] % self._losses.shape[1]] = value
            self._counts[t] += 1
        return bool((self._counts >= self._losses.shape[1]).all())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["losses"].shape != self._losses.shape:
            raise ValueError(
                f"loss history needs shape {tuple(self._losses.shape)}, got {tuple(state['losses'].shape)}"
            )
        # A checkpoint may have been loaded onto a GPU. The history is kept on the CPU.
        self._losses, self._counts = state["losses"].double().cpu().clone(), state["counts"].cpu().clone()


DENSITIES.register_module(name="clts", module=Curriculum)
DENSITIES.register_module(name="loss_second_moment", module=LossSecondMoment)
