"""A law that finds its own centre: it measures the data of the first training steps.

Dims: T timesteps.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.followed_centre import FollowedCentre
from speedit_plugins.policies.densities.over_time import logit_normal
from speedit_plugins.policies.measurement import DataMeasurement, equal_on_all_ranks
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.registry import DENSITIES, build

# A seam may see the data of a step only after its draw, and an evaluation may come first.
_STEPS_WITHOUT_DATA = 10


class CentredByData(AdaptiveDensity):
    """`log_snr_normal`, placed by the log-SNR at which half of the data's variance is explained.

    The data are those of the first batches that `observe` sees, on all ranks. Until they are enough, a
    rectified flow draws logit-normal times, and any other schedule uniform ones. What was found is part of
    the state, so a resumed training does not measure again, unless it was stopped before that.

    Args:
        data_spectrum: returns the spectrum of the data; None measures it.
        prediction_type: of the model; None is the usual one of the schedule. Only `follow` needs it.
        mean: the centre, if it is known. None takes it from `data_spectrum`, or measures it.
        num_samples: samples to measure, >= 2, see `DataMeasurement`; None is 1,024.
        follow: let the centre follow the model's losses, see `FollowedCentre`.
        prior_losses: see `FollowedCentre`; None is 20,000.
        law: the other parameters of `log_snr_normal`; None takes its defaults.

    Raises:
        ValueError: a parameter out of range, or without effect.

    Warns:
        UserWarning: the samples are too few or too odd to measure. The draws stay as they are.

    Example:
        >>> law = CentredByData(NoiseSchedule.rectified_flow(1000), num_samples=400)
        >>> samples = torch.randn(400, 4, generator=torch.Generator().manual_seed(0))
        >>> [law.observe(batch) for batch in samples.split(100)]  # says on stderr what it found
        [False, False, False, True]
        >>> abs(law.mean) < 0.2  # equal variances of 1: half is explained at log-SNR 0
        True
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        data_spectrum: Callable[[], DataSpectrum] | None = None,
        prediction_type: str | None = None,
        *,
        mean: float | None = None,
        num_samples: int | None = None,
        follow: bool = False,
        prior_losses: int | None = None,
        law: Mapping[str, Any] | None = None,
    ) -> None:
        _check(mean, num_samples, follow, prior_losses, law)
        self._schedule = schedule
        self._law = {**(law or {}), "type": "log_snr_normal"}
        # A bad parameter is an error now, not when the data are measured.
        self._density_at(float(schedule.log_snr[len(schedule.log_snr) // 2]))
        self._follow: Callable[..., FollowedCentre] | None = None
        if follow:
            weight = 20_000 if prior_losses is None else prior_losses
            self._follow = partial(FollowedCentre, schedule, prediction_type, prior_losses=weight)
            self._follow(guess=0.0)
        self._followed: FollowedCentre | None = None
        self._given = mean
        self._num_samples = 1024 if num_samples is None else num_samples
        self._measurement: DataMeasurement | None = DataMeasurement(self._num_samples)
        self._num_without_data = 0
        self._has_seen = False
        self.mean: float | None = None
        if mean is None and data_spectrum is not None:
            mean = data_spectrum().log_snr_at()
        if mean is not None:
            self._centre_at(mean)

    @property
    def needs_data(self) -> bool:
        """Whether the centre is still to be measured."""
        return self._measurement is not None

    @property
    def is_ready(self) -> bool:
        """Whether it may draw: it needs no data, has seen some, or has begun a few steps."""
        return not self.needs_data or self._has_seen or 0 < self._num_without_data <= _STEPS_WITHOUT_DATA

    @property
    def learns(self) -> bool:
        """Whether the centre follows the losses."""
        return self._follow is not None

    @property
    def follows_steps(self) -> bool:
        """False: `advance` only counts steps without data, and leaves the density as it is."""
        return False

    def density(self) -> Density:
        if self.mean is not None:
            return self._density_at(self.mean if self._followed is None else self._followed.centre)
        alpha, sigma = self._schedule.alpha, self._schedule.sigma
        is_straight = torch.allclose(alpha + sigma, torch.ones_like(alpha))
        return logit_normal(self._schedule) if is_straight else Density(torch.ones_like(alpha))

    def _density_at(self, mean: float) -> Density:
        density: Density = build(DENSITIES, {**self._law, "mean": mean}, schedule=self._schedule)
        return density

    def advance(self, step: int) -> bool:
        self._num_without_data += 1
        return False

    def update(self, index: Tensor, loss: Tensor) -> bool:
        return self._followed is not None and self._followed.update(index, loss)

    def observe(self, data: Tensor) -> bool:
        self._num_without_data, self._has_seen = 0, True
        measurement = self._measurement
        if measurement is None:
            return False
        try:
            spectrum = measurement.add(data)
            if spectrum is None:
                return False
            centre = equal_on_all_ranks(spectrum.log_snr_at(), data.device)
            self._check_centre(centre)
        except ValueError as error:
            self._measurement = None
            if _is_rank_0():
                warnings.warn(
                    f"auto goes on with the draws that it began with, as it cannot measure the data: {error}",
                    stacklevel=2,
                )
            return False
        self._centre_at(centre)
        if _is_rank_0():
            sys.stderr.write(_found(measurement, centre, spectrum))
        return True

    def _check_centre(self, centre: float) -> None:
        """Raises ValueError if no policy can be centred there."""
        log_snr = self._schedule.log_snr[self._schedule.snr > 0]
        if not float(log_snr[-1]) < centre < float(log_snr[0]):
            raise ValueError(
                f"their middle is at log-SNR {centre:.2f}, outside the schedule's {log_snr[-1]:.2f} to"
                f" {log_snr[0]:.2f}: are they scaled as the model sees them?"
            )
        self._density_at(centre)

    def _centre_at(self, mean: float) -> None:
        self.mean, self._measurement = mean, None
        self._followed = None if self._follow is None else self._follow(guess=mean)

    def state_dict(self) -> dict[str, Any]:
        followed = None if self._followed is None else self._followed.state_dict()
        return {"mean": self.mean, "is_done": not self.needs_data, "followed": followed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        mean = state["mean"]
        if self._given is not None and mean != self._given:
            raise ValueError(f"the state of auto has the mean {mean}, the config {self._given}")
        if mean is None:
            self.mean = self._followed = None
            # A measurement that has failed is not made again.
            self._measurement = None if state["is_done"] else DataMeasurement(self._num_samples)
            return
        self._centre_at(float(mean))
        if (self._followed is None) != (state["followed"] is None):
            raise ValueError("the state of auto needs the same follow as the policy")
        if self._followed is not None:
            self._followed.load_state_dict(state["followed"])


def _check(
    mean: float | None,
    num_samples: int | None,
    follow: bool,
    prior_losses: int | None,
    law: Mapping[str, Any] | None,
) -> None:
    if num_samples is not None and num_samples < 2:
        raise ValueError(f"auto needs num_samples >= 2, got {num_samples}")
    if num_samples is not None and mean is not None:
        raise ValueError(f"auto measures nothing if it gets a mean: leave out num_samples, got {num_samples}")
    if prior_losses is not None and not follow:
        raise ValueError("auto: prior_losses has no effect without follow: leave it out")
    if law is not None and (not isinstance(law, Mapping) or {"mean", "type"} & law.keys()):
        raise ValueError(
            f"auto: law needs a mapping with parameters of log_snr_normal other than mean, got {law!r}"
        )


def _is_rank_0() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _found(measurement: DataMeasurement, centre: float, spectrum: DataSpectrum) -> str:
    """What to say about the data."""
    shape = " x ".join(map(str, measurement.shape))
    sides = ""
    try:
        low, high = (f"{spectrum.log_snr_at(share):.2f}" for share in (0.25, 0.75))
        sides = f" (a quarter at {low}, three quarters at {high})"
    except ValueError:
        # So few samples tell the middle alone.
        pass
    return (
        f"speedit_plugins: auto measured {measurement.num_samples} different samples of {shape}: half of"
        f" their variance is explained at log-SNR {centre:.2f}{sides}\n"
    )


DENSITIES.register_module(name="auto", module=CentredByData)
