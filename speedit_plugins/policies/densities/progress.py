"""A density that follows the progress of the training: a bandit over log-SNR.

Dims: T timesteps, K bins, N losses.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.loss_profile import LossProfile
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.conversion import error_of_epsilon
from speedit_plugins.registry import DENSITIES


class LearningProgress(AdaptiveDensity):
    """Draws more where training has recently lowered the variational bound most: a bandit over log-SNR.

    Kim et al. train a network that maps each sample to a Beta law over the timesteps, by REINFORCE. Its
    reward is the drop of the bound at three chosen timesteps from before to after one step of the optimizer.
    That needs six more passes of the model each time, and the model itself, which a policy in somebody else's
    training does not have. This is a form for losses alone. **The paper's**: a law learned during the
    training whose reward is the drop of the bound; an update after every 40 steps; a pull towards even draws.
    **Ours**: arms are bins of log-SNR, the same for all samples; an arm's reward is the drop at its own noise
    level since the last round, as the loss profile shows it, not the drop that its draws cause elsewhere;
    rewards are scaled so that the 20 % and 80 % quantiles across the arms become -1 and 1, and cut there; the
    preference of an arm is their running mean. Once nothing falls any more, rewards are noise, preferences
    average to about 0, and draws return to uniform ones.
    Sources: Kim et al. 2025, arXiv:2411.09998; Graves et al. 2017, arXiv:1704.03003, for rewards by the
    progress of the loss and their quantiles.

    The bound is the integral of half the squared error of epsilon over log-SNR. A host's variational term
    counts as part of that error.

    Args:
        prediction_type: what the model predicts. None is the usual type of the schedule.
        round_updates: updates from one reward to the next, >= 1.
        rate: share of the newest reward in an arm's preference, in (0, 1].
        strength: how far preferences in [-1, 1] change the draws, >= 0: p ~ exp(strength * preference).
        uniform_floor: share of the draws that stays uniform over the timesteps, in (0, 1].
        num_bins: see `LossProfile`.
        window: see `LossProfile`.

    Raises:
        ValueError: a parameter out of range, or an unknown `prediction_type`.

    Example:
        >>> learned = LearningProgress(NoiseSchedule.cosine(2), "epsilon", round_updates=1, num_bins=2)
        >>> index = torch.tensor([0, 1]).repeat(8)
        >>> for falling in (1.0, 0.5):  # the loss at index 0 falls, that at index 1 does not
        ...     changed = learned.update(index, torch.tensor([falling, 1.0]).double().repeat(8))
        >>> bool(learned.density().table[0] > learned.density().table[1])
        True
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str | None = None,
        *,
        round_updates: int = 40,
        rate: float = 0.1,
        strength: float = 1.0,
        uniform_floor: float = 0.05,
        num_bins: int = 40,
        window: int = 512,
    ) -> None:
        if not (round_updates >= 1 and 0 < rate <= 1 and 0 <= strength < math.inf and 0 < uniform_floor <= 1):
            got = f"{round_updates}, {rate}, {strength} and {uniform_floor}"
            wanted = "round_updates >= 1, rate in (0, 1], strength >= 0 and uniform_floor in (0, 1]"
            raise ValueError(f"adaptive needs {wanted}, got {got}")
        self._profile = LossProfile(schedule, num_bins=num_bins, window=window)
        self._round_updates, self._rate, self._strength = round_updates, rate, strength
        self._floor = uniform_floor
        self._num_updates = 0
        self._before = self._profile.bin_means()
        self._preference = torch.zeros_like(self._before)
        # What a unit of an arm's loss adds to the bound, per unit log-SNR.
        half = error_of_epsilon(schedule, prediction_type) / 2
        counts = torch.bincount(self._profile.bin_of)
        self._in_bound = self._preference.index_add(0, self._profile.bin_of, half) / counts

    def density(self) -> Density:
        preference = self._profile.at_timesteps(self._preference)
        p = torch.softmax(self._strength * preference, dim=0)
        return Density((1 - self._floor) * p + self._floor / len(p))

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Adds losses (N,) measured at the indices (N,). True at the end of a round."""
        self._profile.update(index, loss)
        self._num_updates += 1
        if self._num_updates % self._round_updates:
            return False
        now = self._profile.bin_means()
        # A bin without a mean at the round's beginning has no drop yet.
        drop = (self._in_bound * (self._before - now)).nan_to_num(0.0)
        self._preference = torch.lerp(self._preference, _between_quantiles(drop), self._rate)
        self._before = now
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "profile": self._profile.state_dict(),
            "preference": self._preference.clone(),
            "before": self._before.clone(),
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._profile.load_state_dict(state["profile"])
        self._preference = state["preference"].double().cpu().clone()
        self._before = state["before"].double().cpu().clone()
        self._num_updates = int(state["num_updates"])


def _between_quantiles(values: Tensor) -> Tensor:
    """Values (K,) on the scale where their 20 % quantile is -1 and their 80 % one is 1, cut at both."""
    low, high = torch.quantile(values, values.new_tensor([0.2, 0.8]))
    if not high > low:
        return torch.zeros_like(values)
    scaled: Tensor = (values - low) * (2 / (high - low)) - 1
    return scaled.clamp(-1, 1)


DENSITIES.register_module(name="adaptive", module=LearningProgress)
