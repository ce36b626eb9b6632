"""Timesteps drawn by log-SNR, about the point where the data's structure comes out of the noise.

The best linear denoiser of Gaussian data, the Wiener filter, sees every principal component by itself: at a
signal-to-noise ratio SNR it leaves s / (1 + SNR s) of a component's variance s unexplained. Where half of the
data's variance is explained, most of what a sample looks like is decided.

N samples of d values show a steeper spectrum than the data's, by far where N is not above d: what a filter of
ridge r explains of them is what one of another ridge explains of the data. Source: Silverstein 1995, J.
Multivariate Analysis 55, the deterministic equivalent of the sample covariance.

Dims: N samples, d values of a sample, K variances, T timesteps.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.policies.densities import Density
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DENSITIES

# log-SNRs between which a data set's middle is looked for: variances from e^-40 to e^40.
_WIDEST = 40.0
# Where the smallest of the sampled variances makes more than this share of what decides, it is chance: of
# 4,096 values with variances that fall as i^0 to i^-1, the middle is off by 0.2 and more from a half on, by
# 0.06 or less below a quarter.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class DataSpectrum:
    """Variances along the principal components of a data set.

    Args:
        variances: >= 0, not all 0, shape (K,); kept as float64 on the CPU.
        is_sampled: they are those of K + 1 samples about their mean, with zeros if K > d; the data's own
            otherwise.

    Raises:
        ValueError: variances that are negative, not finite or all 0.
    """

    variances: Tensor
    is_sampled: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "variances", self.variances.detach().to("cpu", torch.float64))
        total = self.variances.sum()
        if not (torch.isfinite(total) and total > 0 and (self.variances >= 0).all()):
            raise ValueError(f"a spectrum needs finite variances >= 0 with a positive sum, got sum {total:g}")

    @classmethod
    def of(cls, samples: Tensor) -> "DataSpectrum":
        """The spectrum of samples (N, ...), N >= 2, as the model sees them: latents, or pixels in [-1, 1].

        Some hundred samples do, also of many thousand values, where few components have most of the variance,
        as of images; of white noise a quarter as many as values. `log_snr_at` says where they are too few.

        Raises:
            ValueError: fewer than two samples, samples that are all the same, values that are not finite,
                integers, which no model sees, or no tensor.
        """
        if not isinstance(samples, Tensor):
            raise ValueError(f"a spectrum needs a tensor (N, ...), got {type(samples).__name__}")
        if samples.ndim < 2 or len(samples) < 2:
            raise ValueError(
                f"a spectrum needs at least two samples (N, ...), got shape {tuple(samples.shape)}"
            )
        if not samples.is_floating_point():
            raise ValueError(
                f"a spectrum needs samples as the model sees them, of floating point, got {samples.dtype}"
            )
        rows = samples.detach().flatten(1).to("cpu", torch.float64, copy=True)
        rows -= rows.mean(dim=0)
        # Of the two Gram matrices, which share their eigenvalues above 0, the smaller.
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        if not torch.isfinite(gram).all():
            raise ValueError("a spectrum needs finite samples, got inf or NaN")
        if not gram.any():
            raise ValueError(f"a spectrum needs samples that differ, got {len(rows)} alike")
        num_variances = len(rows) - 1
        # The mean has taken one component, whose 0 is the smallest.
        found = torch.linalg.eigvalsh(gram).clamp(min=0)[-num_variances:] / num_variances
        return cls(torch.cat([found.new_zeros(num_variances - len(found)), found]), is_sampled=True)

    def explained(self, log_snr: float) -> float:
        """Share of the variance that the best linear denoiser explains, in [0, 1], rising with log-SNR.

        log_snr lies in [-40, 40].
        Of fewer samples than values it is too low where log-SNR is well above their middle.
        """
        noise = math.exp(-log_snr)
        weight = 1 / (self.variances + (self._ridge(noise) if self.is_sampled else noise))
        if self.is_sampled:
            return 1 - float((self.variances * weight).sum() / weight.sum() / self.variances.mean())
        return float((self.variances**2 * weight).sum() / self.variances.sum())

    def _ridge(self, noise: float) -> float:
        """The ridge r that does to the samples what noise of this variance does to the data.

        noise is the harmonic mean of variances + r: r is below it, and below 0 where samples are few.
        """
        low, high = -float(self.variances.min()), noise
        while low < (middle := (low + high) / 2) < high:
            is_below = 1 / float((1 / (self.variances + middle)).mean()) < noise
            low, high = (middle, high) if is_below else (low, middle)
        return high

    def log_snr_at(self, share: float = 0.5) -> float:
        """The log-SNR in [-40, 40] at which `explained` is `share`, in (0, 1).

        Raises:
            ValueError: another share, too few samples to tell, or a log-SNR beyond these.
        """
        if not 0 < share < 1:
            raise ValueError(f"a share of the variance needs to lie in (0, 1), got {share}")
        low, high = -_WIDEST, _WIDEST
        is_within = math.exp(-high) < self.variances.max() < math.exp(-low)
        if not is_within or (not self.is_sampled and not self.explained(low) < share <= self.explained(high)):
            raise ValueError(
                f"{share:.0%} of the data's variance is explained at no log-SNR in [{low:g}, {high:g}]:"
                f" wanted samples as the model sees them, got variances that sum to {self.variances.sum():g}"
            )
        is_reached = self.explained(high) >= share
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self.explained(middle) < share else (low, middle)
        if self.is_sampled and not (is_reached and self._largest_share(middle) <= _LARGEST_SHARE):
            raise ValueError(
                f"{len(self.variances) + 1} samples are too few to tell where {share:.0%} of the data's"
                " variance is explained; wanted more of them"
            )
        return (low + high) / 2

    def _largest_share(self, log_snr: float) -> float:
        """Of what the correction for the number of samples sums up, what a single variance makes."""
        weight = 1 / (self.variances + self._ridge(math.exp(-log_snr)))
        return float(weight.max() / weight.sum())


def log_snr_normal(
    schedule: NoiseSchedule,
    data_spectrum: Callable[[], DataSpectrum] | None = None,
    *,
    mean: float | None = None,
    shift: float = 0.0,
    std: float = 1.2,
    clean_std: float | None = None,
    clean_share: float = 0.0,
) -> Density:
    """log-SNR by a split normal law, cut at the schedule's ends: its mass between the middles to neighbours.

    Its mode is mean + shift; the sides' masses are as their widths. A share of the draws is spread evenly
    over the timesteps that are cleaner than the mode instead.

    Args:
        data_spectrum: gives the spectrum of the data where `mean` is not given.
        mean: centre in log-SNR, finite; lower is noisier. None is `DataSpectrum.log_snr_at()` of the data.
        shift: added to the centre; above 0 is cleaner.
        std: of log-SNR on the side noisier than the mode, > 0.
        clean_std: of log-SNR on its cleaner side, > 0; None is `std`, a normal law.
        clean_share: in [0, 1).

    Raises:
        ValueError: a parameter out of range, no mean and no spectrum, T < 2, no timestep with any mass, or
            none that is cleaner for a clean share.
    """
    cleaner_std = std if clean_std is None else clean_std
    is_finite = math.isfinite(shift + (0.0 if mean is None else mean))
    if not (is_finite and 0 < std < math.inf and 0 < cleaner_std < math.inf):
        raise ValueError(
            "log_snr_normal needs a finite mean and shift, and std and clean_std > 0,"
            f" got {mean}, {shift}, {std} and {clean_std}"
        )
    if not 0 <= clean_share < 1:
        raise ValueError(f"log_snr_normal needs clean_share in [0, 1), got {clean_share}")
    if schedule.num_timesteps < 2:
        raise ValueError(f"log_snr_normal needs T >= 2, got T = {schedule.num_timesteps}")
    # Last, as the data may take a while to be read.
    if mean is None:
        if data_spectrum is None:
            raise ValueError(
                "log_snr_normal needs mean, the log-SNR at which half of your data's variance is explained:"
                " DataSpectrum.of(latents).log_snr_at() of speedit_plugins.policies.spectrum; got none"
            )
        mean = data_spectrum().log_snr_at()
    centre = mean + shift
    log_snr = schedule.log_snr
    normal = _split_normal(log_snr, centre, std, cleaner_std)
    if not clean_share:
        return normal
    cleaner = (log_snr > centre).double()
    if not cleaner.any():
        raise ValueError(
            f"log_snr_normal needs timesteps cleaner than log-SNR {centre:.2f} for clean_share, got none"
        )
    return Density((1 - clean_share) * normal.table + clean_share * cleaner / cleaner.sum())


def _split_normal(log_snr: Tensor, mode: float, noisy_std: float, clean_std: float) -> Density:
    """Mass of each of log_snr (T,), falling, under the law, between the middles to its neighbours."""
    edges = torch.cat([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])  # (T + 1,)
    widths = torch.full_like(edges, clean_std).masked_fill(edges < mode, noisy_std)
    z = (edges - mode) / widths
    # Each tail from its own end, as differences of values near 1 would be 0; torch's ndtr is 0 from -8.3 on.
    tail = torch.special.erfc(z.abs() / math.sqrt(2)) * widths / (noisy_std + clean_std)  # (T + 1,)
    below = torch.where(z < 0, tail, 1 - tail)
    mass = torch.where(z[1:] > 0, tail.diff(), -below.diff())
    if not mass.any():
        raise ValueError(
            f"log_snr_normal has no mass on the schedule, whose log-SNR goes from {log_snr[-1]:.2f} to"
            f" {log_snr[0]:.2f}: its mean + shift is {mode:.2f}"
        )
    if not float(log_snr[-1]) < mode < float(log_snr[0]):
        warnings.warn(
            f"log_snr_normal is centred at log-SNR {mode:.2f}, beyond the schedule, which goes from"
            f" {log_snr[0]:.2f} to {log_snr[-1]:.2f}: is its mean of samples as the model sees them?",
            stacklevel=3,
        )
    return Density(mass)


DENSITIES.register_module(name="log_snr_normal", module=log_snr_normal)
