"""The spectrum of a data set: at which log-SNR its structure emerges from the noise.

The Wiener filter is the best linear denoiser of Gaussian data. It treats each principal component separately:
a component with variance s keeps the unexplained variance s / (1 + SNR s). At the log-SNR where half of the
data's variance is explained, most of what a sample looks like is decided.

The variances of N samples are more spread out than those of the data, much more so if N is not above the
number of values d. The samples therefore need another ridge (the noise variance in the filter) than the data
to explain the same share. `DataSpectrum` corrects for this.
Source: Silverstein 1995, J. Multivariate Analysis 55, deterministic equivalent of the sample covariance.

Dims: N samples, d values of a sample, K variances.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The search covers log-SNR -40 to 40, so variances from e^-40 to e^40.
_WIDEST = 40.0
# The correction sums one term for each sampled variance, and the smallest variance has the largest term. If
# that term has a large share of the sum, chance decides the result. Measured on 4,096 values whose variances
# fall as i^0 to i^-1: the middle is off by 0.2 or more at a share of 1/2, by at most 0.06 below 1/4.
_LARGEST_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class DataSpectrum:
    """Variances along the principal components of a data set.

    `DataSpectrum.of(samples)` measures them.

    Args:
        variances: >= 0, not all 0, shape (K,). Kept as float64 on the CPU.
        is_sampled: the variances were measured on K + 1 samples around their mean, and padded with zeros if
            K > d. False means that they are the true variances of the data.

    Raises:
        ValueError: a variance that is negative or not finite, or all variances 0.

    Example:
        >>> spectrum = DataSpectrum(torch.tensor([4.0]))
        >>> round(spectrum.log_snr_at(0.5), 4)  # half is explained where the noise has variance 4: -ln 4
        -1.3863
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
        """The spectrum measured on samples.

        A few hundred images or latents are enough, because few components have most of their variance. White
        noise needs a quarter as many samples as it has values. `log_snr_at` raises if there are too few.

        Args:
            samples: floating-point samples as the model sees them (latents, or pixels in [-1, 1]), shape
                (N, ...), N >= 2.

        Raises:
            ValueError: no tensor, integers, fewer than two samples, samples that are all equal, or values
                that are not finite.

        Example:
            >>> samples = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
            >>> DataSpectrum.of(samples).variances.shape
            torch.Size([299])
        """
        if not isinstance(samples, Tensor):
            raise ValueError(f"a spectrum needs a tensor (N, ...), got {type(samples).__name__}")
        if samples.ndim < 2 or len(samples) < 2:
            raise ValueError(
                f"a spectrum needs at least two samples (N, ...), got shape {tuple(samples.shape)}"
            )
        if not samples.is_floating_point():
            raise ValueError(
                f"a spectrum needs floating-point samples, scaled as the model sees them, got {samples.dtype}"
            )
        rows = samples.detach().flatten(1).to("cpu", torch.float64, copy=True)
        rows -= rows.mean(dim=0)
        # Both Gram matrices have the same eigenvalues above 0: take the smaller matrix.
        gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
        if not torch.isfinite(gram).all():
            raise ValueError("a spectrum needs finite samples, got inf or NaN")
        if not gram.any():
            raise ValueError(f"a spectrum needs samples that differ, got {len(rows)} equal samples")
        num_variances = len(rows) - 1
        # Subtracting the mean makes one eigenvalue 0, the smallest. It is left out.
        found = torch.linalg.eigvalsh(gram).clamp(min=0)[-num_variances:] / num_variances
        return cls(torch.cat([found.new_zeros(num_variances - len(found)), found]), is_sampled=True)

    @classmethod
    def of_stationary(cls, samples: Tensor) -> "DataSpectrum":
        """The spectrum of large images from few samples, as if every place in them were alike.

        Then the principal components are waves, and each frequency has a covariance of its channels. On
        random fields the middle is within 0.1. Where places differ, as on digits, emoji or clothes, it comes
        out 0.3 to 0.9 too high: `of` is better wherever it has enough samples.

        Args:
            samples: floating-point, shape (N, C, ...) with one to three sides, N >= 2, finite.

        Raises:
            ValueError: samples that are all equal.

        Example:
            >>> samples = torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(0))
            >>> abs(DataSpectrum.of_stationary(samples).log_snr_at()) < 0.3  # white noise of variance 1
            True
        """
        centred = samples.detach().to("cpu", torch.float32)
        centred = centred - centred.mean(dim=0)
        waves = torch.fft.fftn(centred, dim=tuple(range(2, samples.ndim)), norm="ortho").flatten(2)
        covariance = torch.einsum("nck,ndk->kcd", waves, waves.conj()) / (len(samples) - 1)
        return cls(torch.linalg.eigvalsh(covariance).clamp(min=0).flatten())

    def explained(self, log_snr: float) -> float:
        """Share of the variance that the best linear denoiser explains, in [0, 1]. It rises with log-SNR.

        With fewer samples than values, the share is too low at a log-SNR far above the middle of the data.

        Args:
            log_snr: in [-40, 40].

        Example:
            >>> DataSpectrum(torch.tensor([1.0])).explained(0.0)
            0.5
        """
        noise = math.exp(-log_snr)
        weight = 1 / (self.variances + (self._ridge(noise) if self.is_sampled else noise))
        if self.is_sampled:
            return 1 - float((self.variances * weight).sum() / weight.sum() / self.variances.mean())
        return float((self.variances**2 * weight).sum() / self.variances.sum())

    def _ridge(self, noise: float) -> float:
        """The ridge for the sampled variances that matches noise of this variance on the data.

        The ridge r solves noise = harmonic mean of (variances + r). So r < noise, and r < 0 for few samples.
        """
        low, high = -float(self.variances.min()), noise
        while low < (middle := (low + high) / 2) < high:
            is_below = 1 / float((1 / (self.variances + middle)).mean()) < noise
            low, high = (middle, high) if is_below else (low, middle)
        return high

    def log_snr_at(self, share: float = 0.5) -> float:
        """The log-SNR in [-40, 40] at which this share of the data's variance is explained.

        Args:
            share: in (0, 1). 0.5 gives the middle, where the `spectral` policies draw.

        Raises:
            ValueError: `share` out of range, too few samples to tell, or a log-SNR outside [-40, 40].

        Example:
            >>> round(DataSpectrum(torch.tensor([1.0])).log_snr_at(0.9), 4)  # SNR 9: ln 9
            2.1972
        """
        if not 0 < share < 1:
            raise ValueError(f"a share of the variance needs to lie in (0, 1), got {share}")
        low, high = -_WIDEST, _WIDEST
        is_within = math.exp(-high) < self.variances.max() < math.exp(-low)
        if not is_within or (not self.is_sampled and not self.explained(low) < share <= self.explained(high)):
            raise ValueError(
                f"no log-SNR in [{low:g}, {high:g}] explains {share:.0%} of the data's variance: wanted"
                f" samples scaled as the model sees them, got variances that sum to {self.variances.sum():g}"
            )
        is_reached = self.explained(high) >= share
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if self.explained(middle) < share else (low, middle)
        if self.is_sampled and not (is_reached and self._largest_share(middle) <= _LARGEST_SHARE):
            raise ValueError(
                f"{len(self.variances) + 1} samples are too few to tell where {share:.0%} of the data's"
                " variance is explained; wanted more samples"
            )
        return (low + high) / 2

    def _largest_share(self, log_snr: float) -> float:
        """Share of the correction that comes from its largest single term."""
        weight = 1 / (self.variances + self._ridge(math.exp(-log_snr)))
        return float(weight.max() / weight.sum())
