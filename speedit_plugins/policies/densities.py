"""How often each timestep is drawn: schedule -> probability per index.

A fixed density is a function that returns a `Density`; one that follows the training (`Curriculum`,
`LossSecondMoment`) is an object whose `density()` changes after `advance` or `update`.

Dims: T timesteps, B batch.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.distributed import gather_losses
from speedit_plugins.policies.schedule import CONVERGENCE_SNR, NoiseSchedule
from speedit_plugins.registry import DENSITIES


@dataclass(frozen=True, eq=False)
class Density:
    """Probability of each index.

    Args:
        table: unnormalised probability >= 0, shape (T,) float64; normalised on construction.
        boundary_index: first index past the boundary between areas; None where the density knows none.
    """

    table: Tensor
    boundary_index: int | None = None

    def __post_init__(self) -> None:
        total = self.table.sum()
        if not (torch.isfinite(total) and total > 0 and (self.table >= 0).all()):
            raise ValueError(f"a density needs finite values >= 0 with a positive sum, got sum {total:g}")
        object.__setattr__(self, "table", self.table / total)


class AdaptiveDensity(ABC):
    """A density that follows the training; `update` and `advance` say whether it changed."""

    @abstractmethod
    def density(self) -> Density:
        """The density as of now."""

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Learns from losses (B,) at their indices (B,)."""
        return False

    def advance(self, step: int) -> bool:
        """Follows the number of training steps done, >= 0."""
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that `load_state_dict` restores."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`."""


def uniform(schedule: NoiseSchedule) -> Density:
    """Every index equally likely."""
    return Density(torch.ones_like(schedule.alpha))


def thinned(
    schedule: NoiseSchedule, *, k: float = 5.0, snr_boundary: float = CONVERGENCE_SNR, tau: int | None = None
) -> Density:
    """SpeeD's density: the convergence area is drawn k times less often than the rest.

    P = k / (T + tau (k - 1)) for an index below tau, 1 / (T + tau (k - 1)) from tau on.
    Source: Wang et al. 2024, arXiv:2405.17403.

    Args:
        k: how many times rarer the convergence area is; > 0, 1 is uniform.
        snr_boundary: the area begins where the SNR falls below this; > 0.
        tau: the area's first index, in (0, T], in place of `snr_boundary`.

    Raises:
        ValueError: a parameter out of range, or no index before the boundary.

    Warns:
        UserWarning: the parameters or the schedule leave nothing to thin.
    """
    if not 0 < k < math.inf:
        raise ValueError(f"thinned needs k > 0, got {k}")
    if tau is not None and snr_boundary != CONVERGENCE_SNR:
        raise ValueError(f"give tau or snr_boundary, got both: {tau} and {snr_boundary}")
    boundary = schedule.convergence_index(snr_boundary) if tau is None else check_tau(tau, schedule)
    if boundary == 0:
        raise ValueError(f"no timestep has an SNR >= {snr_boundary:g}, the highest is {schedule.snr.max():g}")
    if k == 1 or boundary == schedule.num_timesteps:
        reason = "k = 1" if k == 1 else f"no index lies past the boundary, {boundary}"
        warnings.warn(f"thinned draws every timestep equally often: {reason}", stacklevel=2)
    table = torch.ones_like(schedule.alpha)
    table[:boundary] = k
    return Density(table, boundary)


def asymmetric(
    schedule: NoiseSchedule, *, threshold: float = 0.1, sharpness: float = 1000.0, reflected: bool = True
) -> Density:
    """SpeeDiT's density: 5 : 1 between the steep part of sqrt(1 - alpha-bar) and its flat end.

    p ~ tanh(sharpness (d sqrt(1 - alpha-bar) / du - threshold)) + 1.5, then half of the draws reflected.
    Source: the SpeeDiT README's `SpeeDiffusion`, whose per-step 1e6 and 1e-4 are these constants at T = 1000.

    Args:
        threshold: slope per u that parts steep from flat; > 0.
        sharpness: steepness of the switch; > 0.
        reflected: mix half of p with its reflection at the boundary, q = (p + R p) / 2.

    Raises:
        ValueError: a parameter out of range, or T < 2.
    """
    if not (threshold > 0 and sharpness > 0):
        raise ValueError(f"asymmetric needs threshold > 0 and sharpness > 0, got {threshold} and {sharpness}")
    slope = schedule.gradient((1 - schedule.alphas_cumprod).sqrt())
    p = torch.tanh(sharpness * (slope - threshold)) + 1.5
    pivot = reflection_pivot(schedule, threshold=threshold)
    if pivot == schedule.num_timesteps:
        warnings.warn(f"asymmetric has nothing to thin: no slope falls below {threshold}", stacklevel=2)
    return Density((p + push_reflected(p, pivot)) / 2 if reflected else p, pivot)


def logit_normal(schedule: NoiseSchedule, *, mean: float = 0.0, std: float = 1.0) -> Density:
    """logit(u) ~ N(mean, std): the exact mass of each bin [i / T, (i + 1) / T).

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1; u = 1 is noise, so a positive mean is noisier.

    Args:
        mean: of logit(u), finite.
        std: of logit(u), > 0.
    """
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(f"logit_normal needs a finite mean and std > 0, got {mean} and {std}")
    edges = torch.linspace(0, 1, schedule.num_timesteps + 1, dtype=torch.float64, device="cpu")
    cumulative = torch.special.ndtr((torch.logit(edges) - mean) / std)
    return Density(cumulative.diff())


def reflection_pivot(schedule: NoiseSchedule, *, threshold: float = 0.1) -> int:
    """SpeeDiT's "meaningful steps" m in [1, T]: one past the first flat index, T where there is none."""
    return min(schedule.flat_index(threshold) + 1, schedule.num_timesteps)


def reflect(index: Tensor, pivot: int, num_timesteps: int) -> Tensor:
    """SpeeDiT's reflection t -> m - t below the pivot m, t - m from it on, clipped to [0, T)."""
    return (index - pivot).abs().clamp(max=num_timesteps - 1)


def push_reflected(table: Tensor, pivot: int) -> Tensor:
    """Law of the reflected index when the index has law `table`, shape (T,)."""
    target = reflect(torch.arange(len(table), device=table.device), pivot, len(table))
    return torch.zeros_like(table).index_add(0, target, table)


def check_tau(tau: int, schedule: NoiseSchedule) -> int:
    """`tau`, or a ValueError unless it is an index in (0, T]."""
    if isinstance(tau, bool) or int(tau) != tau or not 0 < tau <= schedule.num_timesteps:
        raise ValueError(f"tau needs to be an index in (0, {schedule.num_timesteps}], got {tau}")
    return int(tau)


class Curriculum(AdaptiveDensity):
    """CLTS: from uniform to a Gaussian over timesteps as training proceeds.

    p = (1 - c) / T + c N(t; mean T, std T) normalised on the grid, c = min(1, step / curriculum_steps).
    Source: Xu et al. 2024, arXiv:2404.07946; `mean` as in the SpeeD release, `std` is a choice for your data.

    Args:
        mean: centre as a fraction of T, in [0, 1].
        std: width as a fraction of T, > 0.
        curriculum_steps: training steps until only the Gaussian is left, >= 1.
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
    """Draws t in proportion to sqrt(E[loss^2]) of its last losses over a uniform floor, uniform at first.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.3 (10 losses per timestep).

    Args:
        history: losses kept per timestep, >= 1; the density stays uniform until every timestep has that many.
        uniform_floor: share of the draws that stays uniform, in (0, 1].
    """

    def __init__(self, schedule: NoiseSchedule, *, history: int = 10, uniform_floor: float = 0.001) -> None:
        if history < 1 or not 0 < uniform_floor <= 1:
            raise ValueError(
                f"needs history >= 1 and uniform_floor in (0, 1], got {history} and {uniform_floor}"
            )
        self._floor = uniform_floor
        self._losses = schedule.alpha.new_zeros(schedule.num_timesteps, history)
        self._counts = torch.zeros_like(schedule.timesteps)

    def density(self) -> Density:
        T, history = self._losses.shape
        if (self._counts < history).any():
            return Density(torch.ones_like(self._losses[:, 0]))
        root = (self._losses**2).mean(dim=1).sqrt()
        # All-zero losses say nothing about where to draw: the floor alone remains.
        p = root / root.sum() if root.sum() > 0 else torch.full_like(root, 1 / T)
        return Density((1 - self._floor) * p + self._floor / T)

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Adds the losses (B,) of all ranks at their indices (B,); one host sync a call."""
        # A non-finite loss would sit in the history and turn the whole density into NaN.
        for t, value in gather_losses(index, loss).tolist():
            self._losses[int(t), self._counts[int(t)] % self._losses.shape[1]] = value
            self._counts[int(t)] += 1
        return bool((self._counts >= self._losses.shape[1]).all())

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["losses"].shape != self._losses.shape:
            raise ValueError(
                f"loss history needs shape {tuple(self._losses.shape)}, got {tuple(state['losses'].shape)}"
            )
        # A checkpoint may have been loaded onto a device; the history lives on the CPU.
        self._losses, self._counts = state["losses"].double().cpu().clone(), state["counts"].cpu().clone()


DENSITIES.register_module(name="uniform", module=uniform)
DENSITIES.register_module(name="thinned", module=thinned)
DENSITIES.register_module(name="asymmetric", module=asymmetric)
DENSITIES.register_module(name="logit_normal", module=logit_normal)
DENSITIES.register_module(name="clts", module=Curriculum)
DENSITIES.register_module(name="loss_second_moment", module=LossSecondMoment)
