"""How far samples lie among the reference, and the reference among samples, by nearest neighbours.

Distances are taken in float64 and in chunks, so that 50,000 x 50,000 of them fit in memory.

Dims: M samples, N reference images, D features.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.trainer.evaluation.distances import CHUNK, check_pair

# Of the squared norms: what a squared distance of equal features may miss zero by, in float64, and more.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Manifolds:
    """Precision, recall and coverage in [0, 1], density >= 0 and about 1 for equal distributions."""

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
    """Precision and recall, density and coverage of samples among a reference.

    A ball around each image reaches to its k-th nearest other one of its own set. Precision is the share of
    samples in a ball of the reference, recall the share of the reference in a ball of the samples. Density
    counts the reference's balls around a sample, over k; coverage is the share of them with a sample in it.
    A distance equal to the radius is inside.

    Source: Kynkäänniemi et al. 2019, arXiv:1904.06991 (precision, recall; k = 3 there); Naeem et al. 2020,
    arXiv:2002.09797 (density, coverage; k = 5).

    Args:
        samples, reference: features (M, D) and (N, D), finite.
        precision_neighbors: k of precision and recall, in [1, min(M, N)).
        density_neighbors: k of density and coverage, in [1, N).
        chunk: rows and columns of a block of distances; it changes rounding alone.

    Raises:
        ValueError: another shape, features that are not finite, or a number out of range.
    """
    check_pair(samples, reference)
    _check_neighbors(samples, reference, precision_neighbors, density_neighbors)
    # Distances are the same from anywhere, and rounded least from the middle.
    # In chunks: in float64 the whole is twice as large again.
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
    """Squared distances (N,), float64, from each row to its k-th nearest other row, for each k.

    Args:
        features: (N, D).
        neighbors: the k, each in [1, N).
        centre: (D,) float64, subtracted first.
    """
    most = max(neighbors)
    nearest = torch.full((len(features), most), torch.inf, dtype=torch.float64)
    for rows, columns, distances in _blocks(features, features, centre, chunk, is_upper=True):
        if rows == columns:
            distances.fill_diagonal_(torch.inf)
        else:
            # The block on the other side of the diagonal is this one on its side.
            nearest[columns] = _smallest(nearest[columns], distances.T)
        nearest[rows] = _smallest(nearest[rows], distances)
    return [nearest[:, k - 1].clone() for k in neighbors]


def _smallest(kept: Tensor, found: Tensor) -> Tensor:
    """The smallest numbers of each row of both, as many as are kept."""
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
    """Rows, columns, and the squared distances between them less `slack` times their squared norms.

    Args:
        is_upper: only on the diagonal and above it.
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
                f"{name} needs to be in [1, {limit}) for {len(samples)} samples and a reference of"
                f" {len(reference)}, got {k}"
            )
