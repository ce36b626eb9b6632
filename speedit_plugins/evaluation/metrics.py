"""Distances between sets of images, measured on features.

Dims: N images, B of them in a batch, D features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


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
