"""The noise level at which a model explains half of what it can learn, from its own losses.

The squared error of x_0 falls from pure noise, where the model knows the condition alone, to 0. The middle is
where half of it is left. The Wiener filter's middle is a guess from before the training. Two things move the
real one: what is not linear in the data, and the condition, which explains a part at any noise level.

Dims: T timesteps, N losses.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.loss_profile import LossProfile, finite_log_snr
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.conversion import converted, usual_prediction_type

# Updates from one reading to the next.
_REFRESH = 20


class FollowedCentre:
    """A centre that begins where the data's spectrum puts it, and goes where the model's losses put it.

    After n losses it is a mean of the two, in which the losses have the share n / (n + `prior_losses`).

    Args:
        schedule: the noise schedule.
        prediction_type: of the model whose losses these are; None is the usual one of the schedule.
        guess: log-SNR where half of the variance is explained, by the spectrum.
        prior_losses: losses after which they count as much as the guess, > 0.

    Raises:
        ValueError: `prior_losses` < 1, or no `prediction_type` on a schedule that does not tell it.

    Example:
        >>> schedule = NoiseSchedule.rectified_flow(1000)
        >>> followed = FollowedCentre(schedule, None, guess=-2.0, prior_losses=1)
        >>> index = torch.arange(1000).repeat(20)
        >>> noise = 1 / schedule.snr[index]  # independent values of variance 1: the middle is at log-SNR 0
        >>> loss = noise / (1 + noise) / schedule.sigma[index] ** 2
        >>> for rows in torch.randperm(20_000, generator=torch.Generator().manual_seed(0)).split(500):
        ...     _ = followed.update(index[rows], loss[rows])
        >>> abs(followed.centre) < 0.1
        True
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        prediction_type: str | None,
        *,
        guess: float,
        prior_losses: int,
    ) -> None:
        if prior_losses < 1:
            raise ValueError(f"a followed centre needs prior_losses >= 1, got {prior_losses}")
        predicted = prediction_type or usual_prediction_type(schedule)
        # A weight on the x_0 loss, as a weight on the model's: so x_0's error is the model's times this.
        self._factor = converted(
            torch.ones_like(schedule.snr), _with_signal(schedule), predicted, source="x0"
        )
        self._log_snr = finite_log_snr(schedule)
        self._profile = LossProfile(schedule)
        self._guess, self._prior_losses = guess, prior_losses
        self._num_updates = 0
        self.centre = guess

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Adds losses of all ranks, float64 (N,), finite, at the indices (N,). True if the centre moved."""
        self._profile.update(index, loss)
        self._num_updates += 1
        if self._num_updates % _REFRESH:
            return False
        return self._read()

    def _read(self) -> bool:
        loss = self._profile.read()
        if loss is None:
            return False
        found = self._middle(loss)
        share = self._profile.num_losses / (self._profile.num_losses + self._prior_losses)
        before, self.centre = self.centre, (1 - share) * self._guess + share * found
        return before != self.centre

    def _middle(self, loss: Tensor) -> float:
        """The log-SNR at which half of x_0's error at the noisiest timestep is left."""
        # From noise to data. More signal never makes the best model worse.
        error = (loss * self._factor).flip(0).cummin(0).values
        return float(self._log_snr.flip(0)[int((error <= error[0] / 2).int().argmax())])

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, for `load_state_dict`."""
        return {
            "profile": self._profile.state_dict(),
            "num_updates": self._num_updates,
            "centre": self.centre,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._profile.load_state_dict(state["profile"])
        self._num_updates, self.centre = int(state["num_updates"]), float(state["centre"])


def _with_signal(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule, with the least signal that it has elsewhere in place of none."""
    if float(schedule.alpha[-1]) > 0 or schedule.num_timesteps < 2:
        return schedule
    alpha = torch.cat([schedule.alpha[:-1], schedule.alpha[-2:-1]])
    sigma = torch.cat([schedule.sigma[:-1], schedule.sigma[-2:-1]])
    return NoiseSchedule(alpha, sigma, schedule.timesteps, schedule.num_original)
