"""Distances between sets of images, measured on features, and the Inception Score.

Dims: N images, B of them in a batch, D features, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a kernel matrix held at once: 2048 x 2048 in float64 are 32 MiB.
CHUNK = 2048


@dataclass(frozen=True)
class Estimate:
    """The mean of a figure over parts of the data, and the standard deviation between the parts."""

    mean: float
    std: float

    @classmethod
    def of(cls, parts: list[float]) -> "Estimate":
        values = torch.tensor(parts, dtype=torch.float64)
        return cls(float(values.mean()), float(values.std(correction=0)))


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, >= 0; on Inception features it is the FID.

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1^1/2 cov2 cov1^1/2)^1/2), in float64. Covariances
    estimated from few samples per feature bias it heavily upwards: compare at equal N only.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric and positive semi-definite; may be singular.

    Raises:
        ValueError: shapes that do not match, values that are not finite, a matrix that is no covariance.
    """
    mean1, mean2 = mean1.detach().double().cpu(), mean2.detach().double().cpu()
    if mean1.ndim != 1 or mean1.shape != mean2.shape:
        raise ValueError(f"the means must both be (D,), got {tuple(mean1.shape)} and {tuple(mean2.shape)}")
    factor1, factor2 = _factor(cov1, len(mean1)), _factor(cov2, len(mean2))
    difference = mean1 - mean2
    if not torch.isfinite(difference).all():
        raise ValueError("the means must be finite, got NaN or infinity")
    # With cov = F F^T the trace of the square root is the sum of the singular values of F1^T F2. They are
    # exact to eps times the largest; square roots of the product's eigenvalues would lose half of the digits.
    overlap = torch.linalg.svdvals(factor1.T @ factor2).sum()
    spread = factor1.square().sum() + factor2.square().sum()
    return max(0.0, float(difference.square().sum() + spread - 2.0 * overlap))


def kernel_distance(  # noqa: PLR0913 - flat, as the keys of a config are
    samples: Tensor,
    reference: Tensor,
    *,
    num_subsets: int,
    subset_size: int,
    generator: torch.Generator,
    chunk: int = CHUNK,
) -> Estimate:
    """Squared maximum mean discrepancy under the kernel (x y / D + 1)^3; on Inception features the KID.

    The unbiased estimate, which may be negative, averaged over random subsets, in float64. Its expectation
    does not depend on N: unlike the Fréchet distance it compares sets of different sizes.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401, section 4.

    Args:
        samples, reference: (N, D), each with its own N.
        num_subsets: drawn without replacement from each side, >= 1.
        subset_size: in [2, N] of the smaller side.
        generator: draws the subsets.
        chunk: rows of a kernel matrix held at once; it changes rounding alone.

    Raises:
        ValueError: another shape, features that are not finite, or a number out of range.
    """
    check_pair(samples, reference)
    most = min(len(samples), len(reference))
    if num_subsets < 1 or not 2 <= subset_size <= most:
        raise ValueError(
            f"kernel_distance needs num_subsets >= 1 and subset_size in [2, {most}] for {len(samples)} and"
            f" {len(reference)} samples, got {num_subsets} and {subset_size}"
        )
    parts = []
    for _ in range(num_subsets):
        rows, columns = (
            torch.randperm(len(features), generator=generator)[:subset_size].split(chunk)
            for features in (samples, reference)
        )
        within = _kernel_sum(samples, rows, samples, rows) + _kernel_sum(
            reference, columns, reference, columns
        )
        within -= _diagonal_sum(samples, rows) + _diagonal_sum(reference, columns)
        across = _kernel_sum(samples, rows, reference, columns)
        parts.append(within / (subset_size * (subset_size - 1)) - 2.0 * across / subset_size**2)
    return Estimate.of(parts)


def inception_score(probabilities: Tensor, *, num_splits: int, generator: torch.Generator) -> Estimate:
    """exp of the mean divergence KL(p(class | image) || p(class)), in [1, K], over random equal parts.

    Source: Salimans et al. 2016, "Improved techniques for training GANs", arXiv:1606.03498, section 4.

    Args:
        probabilities: of each image's classes (N, K); rows sum to 1.
        num_splits: parts of the images, in [1, N]; 10 in the paper.
        generator: draws the parts, so that images sorted by class are no obstacle.

    Raises:
        ValueError: rows that are no probabilities, or a number out of range.
    """
    if probabilities.ndim != 2 or not 1 <= num_splits <= len(probabilities):
        raise ValueError(
            f"inception_score needs probabilities (N, K) and num_splits in [1, N], got"
            f" {tuple(probabilities.shape)} and {num_splits}"
        )
    # 1e-3: what rows of a thousand classes in half precision may miss by.
    if not ((probabilities.sum(dim=1) - 1.0).abs().max() <= 1e-3 and (probabilities >= 0).all()):
        raise ValueError("inception_score needs rows of values >= 0 that sum to 1")
    order = torch.randperm(len(probabilities), generator=generator)
    parts = []
    for rows in order.tensor_split(num_splits):
        part = probabilities[rows].double()
        marginal = part.mean(dim=0)
        # Entropies, since p log p is 0 where p is.
        divergence = torch.special.entr(marginal).sum() - torch.special.entr(part).sum(dim=1).mean()
        parts.append(math.exp(float(divergence)))
    return Estimate.of(parts)


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches, in float64 and O(D^2) memory.

    Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance" (pairwise update).

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        if dim < 1:
            raise ValueError(f"FeatureStatistics needs dim >= 1, got {dim}")
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Takes in a batch of features (B, D), finite.

        Raises:
            ValueError: another shape, or a value that is not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features must be (B, {self.dim}), got {tuple(features.shape)}")
        batch = features.detach().double().cpu()
        if not torch.isfinite(batch).all():
            raise ValueError("features must be finite, got NaN or infinity")
        if len(batch) == 0:
            return
        total = self.count + len(batch)
        mean = batch.mean(dim=0)
        centred = batch - mean
        shift = mean - self._mean
        # Deviations from each batch's own mean: sums of raw squares cancel when the mean is large.
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """(D,) float64; at least one sample is needed."""
        if self.count < 1:
            raise ValueError("the mean needs at least one sample, got none")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64 with the divisor N - 1; at least two samples are needed."""
        if self.count < 2:
            raise ValueError(f"the covariance needs at least two samples, got {self.count}")
        return self._scatter / (self.count - 1)


def feature_statistics(
    images: Tensor, extractor: Callable[[Tensor], Tensor], *, batch_size: int = 500
) -> FeatureStatistics:
    """Statistics of extractor(images) over uint8 images (N, H, W, C), N >= 1, `batch_size` at a time."""
    if batch_size < 1:
        raise ValueError(f"feature_statistics needs batch_size >= 1, got {batch_size}")
    if len(images) == 0:
        raise ValueError("feature_statistics needs at least one image, got none")
    statistics: FeatureStatistics | None = None
    for batch in images.split(batch_size):
        features = extractor(batch)
        statistics = statistics or FeatureStatistics(features.shape[1])
        statistics.update(features)
    assert statistics is not None
    return statistics


def check_pair(samples: Tensor, reference: Tensor) -> None:
    """Raises ValueError unless both are finite features (N, D), each with its own N."""
    if samples.ndim != 2 or reference.ndim != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"the features must both be (N, D), got {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    for name, features in (("samples", samples), ("reference", reference)):
        # In chunks, as all features of 50,000 images are not held a second time.
        if not all(part.isfinite().all() for part in features.split(CHUNK)):
            raise ValueError(f"the features must be finite, got NaN or infinity in {name}")


# In chunks of row numbers, since a subset may be all there is, and twice that does not fit.
_Chunks = tuple[Tensor, ...]


def _kernel_sum(x: Tensor, rows: _Chunks, y: Tensor, columns: _Chunks) -> float:
    """Sum of the kernel over all pairs of these rows of x (N, D) and y."""
    total = 0.0
    for i in rows:
        some = x[i].double()
        for j in columns:
            total += float((some @ y[j].double().T).div_(x.shape[1]).add_(1.0).pow_(3).sum())
    return total


def _diagonal_sum(x: Tensor, rows: _Chunks) -> float:
    """Sum of the kernel of each row and itself."""
    squares = torch.cat([x[i].double().square().sum(dim=1) for i in rows])
    return float((squares / x.shape[1] + 1.0).pow(3).sum())


def _factor(covariance: Tensor, dim: int) -> Tensor:
    """F with covariance = F F^T, float64 (D, D)."""
    covariance = covariance.detach().double().cpu()
    if covariance.shape != (dim, dim):
        raise ValueError(f"the covariance must be {(dim, dim)} like its mean, got {tuple(covariance.shape)}")
    if not torch.isfinite(covariance).all():
        raise ValueError("the covariance must be finite, got NaN or infinity")
    scale = float(covariance.abs().max())
    # 1e-6: what a covariance computed in float32 over a thousand features may miss by.
    if float((covariance - covariance.T).abs().max()) > 1e-6 * scale:
        raise ValueError("the covariance must be symmetric")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2.0)
    if float(values.min()) < -1e-6 * scale * math.sqrt(dim):
        raise ValueError(
            f"the covariance must be positive semi-definite, got eigenvalue {float(values.min()):.3g}"
        )
    # Below rounding of the largest eigenvalue there is noise only, and its square root would not be small.
    floor = dim * torch.finfo(torch.float64).eps * float(values.max().clamp(min=0.0))
    roots: Tensor = torch.where(values > floor, values, 0.0).sqrt()
    return vectors * roots
