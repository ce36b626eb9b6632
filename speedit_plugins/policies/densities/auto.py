"""A law that finds its own centre: it measures the data of the first training steps.

Dims: T timesteps.
"""

import sys
import warnings
from collections.abc import Callable, Mapping
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
    """`log_snr_normal` around the log-SNR at which half of the data's variance is explained.

    The data are those of the first batches that `observe` sees, on all ranks. Until they are enough, a
    rectified flow draws logit-normal times, and any other schedule uniform ones. What was found is part of
    the state, so a resumed training does not measure again.

    Args:
        data_spectrum: returns the spectrum of the data; None measures it.
        mean: the centre, if it is known. None takes it from `data_spectrum`, or measures it.
        num_samples: samples to measure, >= 2, see `DataMeasurement`.
        follow: let the centre follow the model's losses, see `FollowedCentre`.
        prior_losses: see `FollowedCentre`.
        law: the other parameters of `log_snr_normal`; None takes its defaults.

    Raises:
        ValueError: a parameter out of range.

    Warns:
        UserWarning: the samples are too few or too odd to measure. The draws stay as they are.

    Example:
        >>> law = CentredByData(NoiseSchedule.rectified_flow(1000), num_samples=500)
        >>> samples = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
        >>> law.observe(samples), abs(law.mean) < 0.1  # equal variances of 1: half is explained at log-SNR 0
        (True, True)
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        data_spectrum: Callable[[], DataSpectrum] | None = None,
        prediction_type: str | None = None,
        *,
        mean: float | None = None,
        num_samples: int = 1024,
        follow: bool = False,
        prior_losses: int = 20_000,
        law: Mapping[str, Any] | None = None,
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"auto needs num_samples >= 2, got {num_samples}")
        self._schedule = schedule
        self._law = {**(law or {}), "type": "log_snr_normal"}
        # A bad parameter is an error now, not when the data are measured.
        self._density_at(float(schedule.log_snr[len(schedule.log_snr) // 2]))
        if mean is None and data_spectrum is not None:
            mean = data_spectrum().log_snr_at()
        self.mean: float | None = None
        self._follow: Callable[[float], FollowedCentre] | None = None
        if follow:
            self._follow = lambda guess: FollowedCentre(
                schedule, prediction_type, guess=guess, prior_losses=prior_losses
            )
            # Before the first loss, not after it: a bad value is an error now.
            self._follow(0.0)
        self._followed: FollowedCentre | None = None
        self._measurement: DataMeasurement | None = DataMeasurement(num_samples)
        if mean is not None:
            self._centre_at(mean)
        self._num_without_data = 0
        self._has_seen = False

    @property
    def needs_data(self) -> bool:
        """Whether the centre is still to be measured."""
        return self.mean is None

    @property
    def is_ready(self) -> bool:
        """Whether it may draw: it knows its centre, has seen data, or has begun a few steps."""
        return not self.needs_data or self._has_seen or 0 < self._num_without_data <= _STEPS_WITHOUT_DATA

    def density(self) -> Density:
        if self.mean is not None:
            centre = self.mean if self._followed is None else self._followed.centre
            return self._density_at(centre)
        alpha, sigma = self._schedule.alpha, self._schedule.sigma
        is_straight = torch.allclose(alpha + sigma, torch.ones_like(alpha))
        return logit_normal(self._schedule) if is_straight else Density(torch.ones_like(alpha))

    def _density_at(self, mean: float) -> Density:
        density: Density = build(DENSITIES, {**self._law, "mean": mean}, schedule=self._schedule)
        return density

    def advance(self, step: int) -> bool:
        self._num_without_data += 1
        return False

    @property
    def learns(self) -> bool:
        """Whether the centre follows the losses."""
        return self._follow is not None

    def update(self, index: Tensor, loss: Tensor) -> bool:
        return self._followed is not None and self._followed.update(index, loss)

    def observe(self, data: Tensor) -> bool:
        self._num_without_data, self._has_seen = 0, True
        if self._measurement is None:
            return False
        measurement = self._measurement
        try:
            spectrum = measurement.add(data)
            if spectrum is None:
                return False
            self._measurement = None
            centre = equal_on_all_ranks(spectrum.log_snr_at(), data.device)
        except ValueError as error:
            self._measurement = None
            warnings.warn(
                f"auto goes on with the draws that it began with, since it cannot measure the data: {error}",
                stacklevel=2,
            )
            return False
        self._centre_at(centre)
        _tell(measurement, centre, spectrum)
        return True

    def _centre_at(self, mean: float) -> None:
        self.mean, self._measurement = mean, None
        self._followed = None if self._follow is None else self._follow(mean)

    def state_dict(self) -> dict[str, Any]:
        followed = None if self._followed is None else self._followed.state_dict()
        return {"mean": self.mean, "followed": followed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["mean"] is None:
            return
        self._centre_at(float(state["mean"]))
        if (self._followed is None) != (state["followed"] is None):
            raise ValueError("the state of auto needs the same follow as the policy")
        if self._followed is not None:
            self._followed.load_state_dict(state["followed"])


def _tell(measurement: DataMeasurement, centre: float, spectrum: DataSpectrum) -> None:
    """Says on stderr what was found, on rank 0."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    low, high = (f"{spectrum.log_snr_at(share):.2f}" for share in (0.25, 0.75))
    shape = " x ".join(map(str, measurement.shape))
    sys.stderr.write(
        f"speedit_plugins: auto measured {measurement.num_samples} samples of {shape}: half of their variance"
        f" is explained at log-SNR {centre:.2f} (a quarter at {low}, three quarters at {high})\n"
    )


DENSITIES.register_module(name="auto", module=CentredByData)
