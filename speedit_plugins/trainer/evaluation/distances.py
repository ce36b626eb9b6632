"""Distances between sets of images in a feature space, and the Inception Score.

Dims: N images, B of them in a batch, D features, K classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows of a kernel matrix held at once: 2048 x 2048 values take 32 MiB in float64.
CHUNK = 2048


@dataclass(frozen=True)
class Estimate:
    """Mean of a metric over parts of the data, and its standard deviation between the parts."""

    mean: float
    std: float

    @classmethod
    def of(cls, parts: list[float]) -> "Estimate":
        values = torch.tensor(parts, dtype=torch.float64)
        return cls(float(values.mean()), float(values.std(correction=0)))


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, >= 0; with Inception features it is the FID.

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1^1/2 cov2 cov1^1/2)^1/2), in float64. It is strongly
    biased upwards if the covariances were estimated from few samples per feature. Compare only distances with
    equal N.

    Source: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".

    Args:
        mean1, mean2: (D,).
        cov1, cov2: (D, D), symmetric and positive semi-definite; may be singular.

    Raises:
        ValueError: shapes do not match, values are not finite, or a matrix is not a covariance.
    """
    mean1, mean2 = mean1.detach().double().cpu(), mean2.detach().double().cpu()
    if mean1.ndim != 1 or mean1.shape != mean2.shape:
        raise ValueError(f"the means must both be (D,), got {tuple(mean1.shape)} and {tuple(mean2.shape)}")
    factor1, factor2 = _factor(cov1, len(mean1)), _factor(cov2, len(mean2))
    difference = mean1 - mean2
    if not torch.isfinite(difference).all():
        raise ValueError("the means must be finite, got NaN or infinity")
    # With cov = F F^T, the trace of the square root is the sum of the singular values of F1^T F2. Their error
    # is eps times the largest. Square roots of the product's eigenvalues would lose half of the digits.
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
    """Squared maximum mean discrepancy with the kernel (x y / D + 1)^3; with Inception features, the KID.

    The unbiased estimate, averaged over random subsets, in float64; it may be negative. Its expectation does
    not depend on N, so unlike the Fréchet distance it can compare sets of different sizes.

    Source: Binkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401, section 4.

    Args:
        samples, reference: (N, D), each with its own N.
        num_subsets: number of subsets taken from each side, >= 1.
        subset_size: size of a subset, sampled without replacement; in [2, N] of the smaller side.
        generator: chooses the subsets.
        chunk: rows of a kernel matrix held at once; affects only rounding.

    Raises:
        ValueError: shapes do not match, features are not finite, or a number is out of range.
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
    """exp of the mean of KL(p(class | image) || p(class)), in [1, K], over equal random parts of the images.

    Source: Salimans et al. 2016, "Improved techniques for training GANs", arXiv:1606.03498, section 4.

    Args:
        probabilities: class probabilities of each image (N, K); rows sum to 1.
        num_splits: number of parts, in [1, N]; 10 in the paper.
        generator: chooses the parts at random, since images may be sorted by class.

    Raises:
        ValueError: a row is not a distribution, or a number is out of range.
    """
    if probabilities.ndim != 2 or not 1 <= num_splits <= len(probabilities):
        raise ValueError(
            f"inception_score needs probabilities (N, K) and num_splits in [1, N], got"
            f" {tuple(probabilities.shape)} and {num_splits}"
        )
    # 1e-3 allows for half-precision probabilities of a thousand classes.
    if not ((probabilities.sum(dim=1) - 1.0).abs().max() <= 1e-3 and (probabilities >= 0).all()):
        raise ValueError("inception_score needs rows of values >= 0 that sum to 1")
    order = torch.randperm(len(probabilities), generator=generator)
    parts = []
    for rows in order.tensor_split(num_splits):
        part = probabilities[rows].double()
        marginal = part.mean(dim=0)
        # Computed by entropies, as entr(p) = -p log p is 0 at p = 0.
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

    @classmethod
    def of(cls, features: Tensor) -> "FeatureStatistics":
        """Those of one set of finite features (N, D); raises ValueError as `update`."""
        found = cls(features.shape[1])
        found.update(features)
        return found

    def update(self, features: Tensor) -> None:
        """Adds a batch of finite features (B, D).

        Raises:
            ValueError: the shape is another one, or a value is not finite.
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
        # Deviations from the batch's own mean: with raw squares, a large mean would cancel the digits.
        self._scatter += centred.T @ centred + torch.outer(shift, shift) * (self.count * len(batch) / total)
        self._mean += shift * (len(batch) / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Mean (D,), float64; raises ValueError without samples."""
        if self.count < 1:
            raise ValueError("the mean needs at least one sample, got none")
        return self._mean.clone()

    @property
    def covariance(self) -> Tensor:
        """Covariance (D, D), float64, with divisor N - 1; raises ValueError with fewer than two samples."""
        if self.count < 2:
            raise ValueError(f"the covariance needs at least two samples, got {self.count}")
        return self._scatter / (self.count - 1)

    def frechet_distance(self, other: "FeatureStatistics") -> float:
        """`frechet_distance` of the two sets of features, of at least two samples each."""
        return frechet_distance(self.mean, self.covariance, other.mean, other.covariance)


def feature_statistics(
    images: Tensor, extractor: Callable[[Tensor], Tensor], *, batch_size: int = 500
) -> FeatureStatistics:
    """Mean and covariance of extractor(images) for uint8 images (N, H, W, C), N >= 1, in batches."""
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
        # In chunks, to avoid a second copy of the features of 50,000 images.
        if not all(part.isfinite().all() for part in features.split(CHUNK)):
            raise ValueError(f"the features must be finite, got NaN or infinity in {name}")


# Row numbers in chunks. A subset may be the whole set, and a copy of it might not fit into memory.
_Chunks = tuple[Tensor, ...]


def _kernel_sum(x: Tensor, rows: _Chunks, y: Tensor, columns: _Chunks) -> float:
    """Sum of the kernel over all pairs of the given rows of x (N, D) and y (N, D)."""
    total = 0.0
    for i in rows:
        some = x[i].double()
        for j in columns:
            total += float((some @ y[j].double().T).div_(x.shape[1]).add_(1.0).pow_(3).sum())
    return total


def _diagonal_sum(x: Tensor, rows: _Chunks) -> float:
    """Sum of the kernel of each given row with itself."""
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
    # 1e-6 allows for covariances of a thousand features that were computed in float32.
    if float((covariance - covariance.T).abs().max()) > 1e-6 * scale:
        raise ValueError("the covariance must be symmetric")
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2.0)
    if float(values.min()) < -1e-6 * scale * math.sqrt(dim):
        raise ValueError(
            f"the covariance must be positive semi-definite, got eigenvalue {float(values.min()):.3g}"
        )
    # Eigenvalues below the rounding error of the largest one are noise, whose square roots would matter.
    floor = dim * torch.finfo(torch.float64).eps * float(values.max().clamp(min=0.0))
    roots: Tensor = torch.where(values > floor, values, 0.0).sqrt()
    return vectors * roots
