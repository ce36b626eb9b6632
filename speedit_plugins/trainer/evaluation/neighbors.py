"""Precision, recall, density and coverage of samples, computed with nearest neighbours.

Distances are computed in float64 and in chunks, as all 50,000 x 50,000 would not fit into memory.

Dims: M samples, N reference images, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.trainer.evaluation.distances import CHUNK, check_pair

# Tolerance relative to the squared norms: above the float64 error of the squared distance of equal features.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Manifolds:
    """Precision, recall and coverage are in [0, 1]. Density is >= 0, and about 1 for equal distributions."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(
    samples: Tensor,
    reference: Tensor,
    *,
    precision_neighbors: int = 3,
    density_neighbors: int = 5,
    chunk: int = CHUNK,
) -> Manifolds:
    """Precision, recall, density and coverage of samples with respect to a reference.

    Each image has a ball that reaches to its k-th nearest neighbour in its own set, boundary included.

    - Precision: fraction of samples inside at least one ball of the reference.
    - Recall: fraction of reference images inside at least one ball of the samples.
    - Density: mean number of reference balls that contain a sample, divided by k.
    - Coverage: fraction of reference balls that contain at least one sample.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991 (precision, recall; k = 3); Naeem et al. 2020,
    arXiv:2002.09797 (density, coverage; k = 5).

    Args:
        samples, reference: features (M, D) and (N, D), finite.
        precision_neighbors: k for precision and recall, in [1, min(M, N)).
        density_neighbors: k for density and coverage, in [1, N).
        chunk: rows and columns of a block of distances; affects only rounding.

    Raises:
        ValueError: shapes do not match, features are not finite, or a number is out of range.
    """
    check_pair(samples, reference)
    _check_neighbors(samples, reference, precision_neighbors, density_neighbors)
    # Subtracting the centre leaves distances unchanged and reduces rounding. It is computed in chunks, as a
    # float64 copy of the whole set would take twice its memory.
    centre = sum(part.double().sum(dim=0) for part in reference.split(chunk)) / len(reference)
    (own,) = neighbor_distances(samples, [precision_neighbors], centre=centre, chunk=chunk)
    theirs, denser = neighbor_distances(
        reference, [precision_neighbors, density_neighbors], centre=centre, chunk=chunk
    )
    is_precise = torch.zeros(len(samples), dtype=torch.bool)
    is_recalled, is_covered = torch.zeros(2, len(reference), dtype=torch.bool)
    num_inside = 0
    for rows, columns, distances in _blocks(samples, reference, centre, chunk, slack=ROUNDING):
        is_precise[rows] |= (distances <= theirs[columns]).any(dim=1)
        is_recalled[columns] |= (distances <= own[rows, None]).any(dim=0)
        inside = distances <= denser[columns]
        is_covered[columns] |= inside.any(dim=0)
        num_inside += int(inside.sum())
    return Manifolds(
        precision=_share(is_precise),
        recall=_share(is_recalled),
        density=num_inside / (density_neighbors * len(samples)),
        coverage=_share(is_covered),
    )


def neighbor_distances(
    features: Tensor, neighbors: Sequence[int], *, centre: Tensor, chunk: int = CHUNK
) -> list[Tensor]:
    """Squared distances (N,), float64, from each row to its k-th nearest other row; one tensor per k.

    Args:
        features: (N, D).
        neighbors: values of k, each in [1, N).
        centre: (D,) float64, subtracted first to reduce rounding.
        chunk: rows and columns of a block of distances.
    """
    most = max(neighbors)
    nearest = torch.full((len(features), most), torch.inf, dtype=torch.float64)
    for rows, columns, distances in _blocks(features, features, centre, chunk, is_upper=True):
        if rows == columns:
            distances.fill_diagonal_(torch.inf)
        else:
            # The mirrored block on the other side of the diagonal is the transpose of this one.
            nearest[columns] = _smallest(nearest[columns], distances.T)
        nearest[rows] = _smallest(nearest[rows], distances)
    return [nearest[:, k - 1].clone() for k in neighbors]


def _smallest(kept: Tensor, found: Tensor) -> Tensor:
    """The smallest numbers in each row of `kept` and `found` together, as many as `kept` has."""
    fewer = found.topk(min(kept.shape[1], found.shape[1]), dim=1, largest=False).values
    return torch.cat([kept, fewer], dim=1).topk(kept.shape[1], dim=1, largest=False).values


def _blocks(
    first: Tensor,
    second: Tensor,
    centre: Tensor,
    chunk: int,
    *,
    slack: float = 0.0,
    is_upper: bool = False,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (rows, columns, squared distances between them), block by block.

    Args:
        first, second: features (N, D).
        centre: (D,), subtracted from both.
        chunk: rows and columns of a block.
        slack: distances are reduced by this fraction of the squared norms, to absorb rounding.
        is_upper: yield only blocks on and above the diagonal.
    """
    for start in range(0, len(first), chunk):
        rows = slice(start, min(start + chunk, len(first)))
        x = first[rows].double() - centre
        x_norms = x.square().sum(dim=1, keepdim=True) * (1.0 - slack)
        for other in range(start if is_upper else 0, len(second), chunk):
            columns = slice(other, min(other + chunk, len(second)))
            y = second[columns].double() - centre
            y_norms = y.square().sum(dim=1) * (1.0 - slack)
            yield rows, columns, torch.addmm(y_norms, x, y.T, alpha=-2.0).add_(x_norms)


def _share(chosen: Tensor) -> float:
    return float(chosen.double().mean())


def _check_neighbors(
    samples: Tensor, reference: Tensor, precision_neighbors: int, density_neighbors: int
) -> None:
    least = min(len(samples), len(reference))
    for name, k, limit in (
        ("precision_neighbors", precision_neighbors, least),
        ("density_neighbors", density_neighbors, len(reference)),
    ):
        if not 1 <= k < limit:
            raise ValueError(
                f"{name} must be in [1, {limit}) for {len(samples)} samples and a reference of"
                f" {len(reference)}, got {k}"
            )
