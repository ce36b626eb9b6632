"""What `speedit-spectrum` says: the centre of the data, and what each law of timesteps makes of it.

A rectified flow mixes data and noise by x_t = (1 - t) x_0 + t eps. Log-SNR L is there t = 1 / (1 + e^(L/2)),
so logit(t) = -L/2. A shift by s adds ln s to logit(t).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.recipes.spectral import spectral_flow
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.spectrum import DataSpectrum

POLICIES = ("spectral", "spectral_fast", "spectral_flow")
_SHARES = (0.05, 0.5, 0.95)
# An image in [-1, 1] has at most 1, and latents are scaled to about 1 (Rombach et al. 2022, arXiv:2112.10752,
# appendix G). Latents that were not scaled have 5 with Stable Diffusion's autoencoder.
_LARGE_STD = 2.0


@dataclass(frozen=True)
class Draws:
    """Where a policy draws, as timesteps or as flow times. 90 % of the draws are from `low` to `high`."""

    low: float
    median: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """The spectrum of samples, in the numbers that a policy needs.

    Args:
        image_size: side in pixels that images were cropped to; None if they were not.
        num_samples: how many samples were measured.
        num_found: how many the source has.
        what: what they are, "images" or "latents".
        shape: of one sample.
        mean: of all values.
        std: standard deviation of all values around `mean`.
        centre: log-SNR at which half of the variance is explained, the `mean` of the spectral policies.
        quarter: log-SNR at which 25 % is explained; None if the samples are too few to tell.
        three_quarters: log-SNR at which 75 % is explained; None likewise.
        has_equal_channels: whether the first dimension of a sample has several channels that are all equal.
    """

    image_size: int | None
    num_samples: int
    num_found: int
    what: str
    shape: tuple[int, ...]
    mean: float
    std: float
    centre: float
    quarter: float | None
    three_quarters: float | None
    has_equal_channels: bool

    @property
    def peak(self) -> float:
        """Log-SNR where `spectral_flow` draws most."""
        density = spectral_flow(mean=self.centre)["density"]
        return float(density["slope"] * density["mean"] + density["offset"])

    @property
    def logit_mean(self) -> float:
        """Mean of a logit-normal law with its median at `peak`, for t = 1 as noise."""
        return -self.peak / 2

    @property
    def shift(self) -> float:
        """Shift that moves the median of logit-normal(0, 1) to `peak`. Above 1 is noisier."""
        return math.exp(self.logit_mean)


def measure(values: torch.Tensor, *, num_found: int, what: str, image_size: int | None = None) -> Measurement:
    """Measures samples (N, ...).

    Raises:
        ValueError: see `DataSpectrum.of` and `DataSpectrum.log_snr_at`.

    Example:
        >>> values = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(measure(values, num_found=4000, what="samples").centre, 1) + 0.0  # unit variance: log-SNR 0
        0.0
    """
    spectrum = DataSpectrum.of(values)
    std, mean = torch.std_mean(values.double())
    return Measurement(
        image_size=image_size,
        num_samples=len(values),
        num_found=num_found,
        what=what,
        shape=tuple(values.shape[1:]),
        mean=float(mean),
        std=float(std),
        centre=spectrum.log_snr_at(),
        quarter=_told(spectrum, 0.25),
        three_quarters=_told(spectrum, 0.75),
        has_equal_channels=values.ndim == 4 and values.shape[1] > 1 and bool((values == values[:, :1]).all()),
    )


def flow_time(log_snr: float) -> float:
    """Time in (0, 1) at which a rectified flow has this log-SNR; 1 is noise.

    Example:
        >>> flow_time(0.0)
        0.5
    """
    return 1 / (1 + math.exp(log_snr / 2))


def draws_of(policy: str, centre: float, schedule: NoiseSchedule) -> Draws | None:
    """Where a spectral policy draws on a schedule: timesteps if it is variance-preserving, else flow times.

    None if the centre is so far outside the schedule that there is no such policy.
    """
    try:
        # The report names what lies outside of a schedule by itself.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            density = build_policy({"type": policy, "mean": centre}, schedule).density
    except ValueError:
        return None
    index = torch.searchsorted(density.cumsum(0), torch.tensor(_SHARES, dtype=torch.float64))
    index = index.clamp(max=schedule.num_timesteps - 1)
    times = schedule.timesteps if schedule.is_variance_preserving else schedule.sigma
    return Draws(*times[index].tolist())


def host_options(measurement: Measurement) -> dict[str, str]:
    """How to ask for the logit-normal law at `peak`: what is asked, and the option of it."""
    mean, shift = _number(measurement.logit_mean), f"{measurement.shift:.2f}"
    return {
        "this package": f"{{density: {{type: logit_normal, mean: {mean}}}, weighting: constant}}",
        "sd-scripts, musubi-tuner": f"--timestep_sampling shift --discrete_flow_shift {shift}",
        "SimpleTuner": f"--flow_sigmoid_scale 1 --flow_schedule_shift {shift}",
        # The scripts' index rises as noise falls, and their scheduler adds ln(its shift) to logit(t). Their
        # --logit_std is 1 by default.
        "diffusers' scripts": f"--weighting_scheme logit_normal --logit_mean"
        f" {_number(-measurement.logit_mean)} (+ ln of the scheduler's shift)",
    }


def report(measurement: Measurement, source: str) -> str:
    """The measurement of one set of samples as text, and what every policy makes of it."""
    centre = measurement.centre
    quartiles = [
        f"{share} at {'a log-SNR that so few samples do not tell' if place is None else _place(place)}"
        for share, place in (
            ("a quarter", measurement.quarter),
            ("three quarters", measurement.three_quarters),
        )
    ]
    options = host_options(measurement)
    width = max(map(len, options))
    lines = [
        f"{source}: {_counted(measurement)} of shape {_shape(measurement)}, mean {_number(measurement.mean)},"
        f" standard deviation {measurement.std:.2f}",
        *_notes(measurement),
        "",
        f"centre  log-SNR {_place(centre)}: half of the variance can be told from the noise there,",
        f"        {' and '.join(quartiles)}",
        "",
        *_policy_rows(centre),
        "",
        f"logit-normal  median at log-SNR {_place(measurement.peak)}, where spectral_flow draws most: mean"
        f" {_number(measurement.logit_mean)}, or shift {measurement.shift:.2f}",
        *(f"  {host:<{width}}  {option}" for host, option in options.items()),
    ]
    return "\n".join(lines)


def comparison(measurements: Sequence[Measurement], source: str) -> str:
    """One row for each size of the same images."""
    lines = [
        f"{source}: {_counted(measurements[0])}",
        *_notes(measurements[0]),
        "",
        f"{'size':>6}  {'shape':<16} {'centre':>7} {'t':>6} {'25 %':>7} {'75 %':>7}"
        f" {'logit-normal mean':>18} {'shift':>6}",
    ]
    for each in measurements:
        quartiles = ["-" if q is None else _number(q) for q in (each.quarter, each.three_quarters)]
        lines.append(
            f"{each.image_size!s:>6}  {_shape(each):<16} {_number(each.centre):>7}"
            f" {flow_time(each.centre):>6.2f} {quartiles[0]:>7} {quartiles[1]:>7}"
            f" {_number(each.logit_mean):>18} {each.shift:>6.2f}"
        )
    explained = "Log-SNR at which half, 25 % and 75 % of the variance can be told from the noise."
    return "\n".join([*lines, "", f"{explained} One size alone gives the policies too."])


def as_json(measurement: Measurement) -> dict[str, Any]:
    """All numbers of the report as plain values. Log-SNR is natural; t = 1 is noise."""
    linear, flow = NoiseSchedule.linear(1000), NoiseSchedule.rectified_flow(1000)
    centre = measurement.centre
    policies: Mapping[str, Any] = {
        name: {
            "config": {"type": name, "mean": centre},
            "timesteps_linear_1000": _fields(draws_of(name, centre, linear)),
            "times_rectified_flow": _fields(draws_of(name, centre, flow)),
        }
        for name in POLICIES
    }
    return {
        **vars(measurement),
        "shape": list(measurement.shape),
        "centre_time": flow_time(centre),
        "policies": policies,
        "logit_normal": {
            "log_snr": measurement.peak,
            "mean": measurement.logit_mean,
            "shift": measurement.shift,
            "options": host_options(measurement),
        },
    }


def _told(spectrum: DataSpectrum, share: float) -> float | None:
    try:
        return spectrum.log_snr_at(share)
    except ValueError:
        return None


def _policy_rows(centre: float) -> list[str]:
    schedules = (NoiseSchedule.linear(1000), NoiseSchedule.rectified_flow(1000))
    config_width = len(_config("spectral_fast", centre)) + 2
    lines = [
        f"{'policy: median t, 90 % of the draws':<{config_width}}  {'linear, T = 1000':<24}  rectified flow"
    ]
    for name in POLICIES:
        texts = []
        for schedule, digits in zip(schedules, (0, 2), strict=True):
            draws = draws_of(name, centre, schedule)
            texts.append(
                "outside of the schedule"
                if draws is None
                else f"{draws.median:.{digits}f} ({draws.low:.{digits}f} to {draws.high:.{digits}f})"
            )
        lines.append(f"{_config(name, centre):<{config_width}}  {texts[0]:<24}  {texts[1]}")
    return lines


def _config(policy: str, centre: float) -> str:
    return f"{{type: {policy}, mean: {_number(centre)}}}"


def _notes(measurement: Measurement) -> list[str]:
    notes = []
    if measurement.has_equal_channels:
        num = measurement.shape[0]
        notes += [
            f"note: the {num} channels are equal, as in grey images that are read as RGB. For a model of one",
            f"      channel each log-SNR is ln {num} = {math.log(num):.2f} higher: --grey reads them so.",
        ]
    if measurement.std > _LARGE_STD:
        notes += [
            "note: models see data with a standard deviation near 1. Were these scaled as the model sees"
            " them?",
            "      Latents of a diffusers autoencoder are (x - shift_factor) * scaling_factor.",
        ]
    return notes


def _counted(measurement: Measurement) -> str:
    if measurement.num_samples == measurement.num_found:
        return f"{measurement.num_samples:,} {measurement.what}"
    return f"{measurement.num_samples:,} of {measurement.num_found:,} {measurement.what}"


def _shape(measurement: Measurement) -> str:
    return " x ".join(map(str, measurement.shape))


def _place(log_snr: float) -> str:
    return f"{_number(log_snr)} (t {flow_time(log_snr):.2f})"


def _number(value: float) -> str:
    """Two decimals. Adding 0.0 avoids "-0.00"."""
    return f"{round(value, 2) + 0.0:.2f}"


def _fields(draws: Draws | None) -> dict[str, float] | None:
    return None if draws is None else dict(vars(draws))
