"""Distances between point clouds, and the three measures of a set of generated ones against a reference.

Conventions are those of PointFlow's code. Its GPU code approximates the earth mover's distance; here it is
exact.

Dims: M samples, R reference clouds, N points.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A matching of N points takes time in N^3: 2 seconds for one pair of this size on one core, 0.25 for half.
MAX_MATCHED_POINTS = 2048
# Points that are looked up at once. Their distances take 32 MiB.
_BUDGET = 2**22

Progress = Callable[[int], object]
_Points = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ShapeScores:
    """Measures of M samples against M reference clouds.

    Args:
        mmd: minimum matching distance, the mean over the reference of the distance to the nearest sample.
        coverage: share of the reference that is the nearest one of some sample, in (0, 1].
        one_nn_accuracy: share of all 2 M clouds whose nearest other cloud is from their own set, in [0, 1].
            0.5 means that the two sets cannot be told apart, 1 that they are apart, 0 that one copies the
            other.
    """

    mmd: float
    coverage: float
    one_nn_accuracy: float


def chamfer_distances(first: Tensor, second: Tensor, *, progress: Progress | None = None) -> Tensor:
    """Chamfer distance of every pair, float64 (M, R).

    The mean squared distance from each point to the nearest point of the other cloud, summed over the two
    directions. Clouds are searched as trees, one against many, so memory is O((M + R) N).

    Source: Yang et al. 2019, arXiv:1906.12320, equation 15. It sums over points; its code takes the mean.

    Args:
        first: (M, 3, N).
        second: (R, 3, N'), or the same tensor as `first`, which takes half of the time.
        progress: called with 1 after each cloud: M + R times, M times for the same tensor.

    Raises:
        ValueError: a shape is wrong, or a value is not finite.
    """
    one, other = _clouds(first, "first"), _clouds(second, "second")
    forth = _directed(one, other, progress)
    back = forth if first is second else _directed(other, one, progress)
    return torch.from_numpy(forth + back.T)


def earth_mover_distances(first: Tensor, second: Tensor, *, progress: Progress | None = None) -> Tensor:
    """Earth mover's distance of every pair, float64 (M, R): the mean distance under the best matching.

    Source: Yang et al. 2019, arXiv:1906.12320, equation 16, with the mean over points as in its code.

    Args:
        first: (M, 3, N), N at most MAX_MATCHED_POINTS.
        second: (R, 3, N), or the same tensor as `first`, which takes half of the time.
        progress: called with 1 after each pair that is matched: M R times, M (M - 1) / 2 times for the same.

    Raises:
        ValueError: a shape is wrong, a value is not finite, or there are too many points.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    one, other = _clouds(first, "first"), _clouds(second, "second")
    if one.shape[1] != other.shape[1] or one.shape[1] > MAX_MATCHED_POINTS:
        raise ValueError(
            f"the earth mover's distance needs clouds with the same number of points, at most"
            f" {MAX_MATCHED_POINTS}, got {one.shape[1]} and {other.shape[1]}; take fewer of the points"
        )
    found = np.zeros((len(one), len(other)))
    for i, points in enumerate(one):
        for j in range(i + 1 if first is second else 0, len(other)):
            cost = cdist(points, other[j])
            found[i, j] = cost[linear_sum_assignment(cost)].mean()
            if progress is not None:
                progress(1)
    return torch.from_numpy(found + found.T if first is second else found)


# A name in a config, and how distances are measured.
DISTANCES: Mapping[str, Callable[..., Tensor]] = {
    "chamfer": chamfer_distances,
    "earth_mover": earth_mover_distances,
}


def shape_scores(
    samples: Tensor, reference: Tensor, *, distance: str = "chamfer", progress: Progress | None = None
) -> ShapeScores:
    """MMD, coverage and 1-NN accuracy of samples against as many reference clouds.

    Args:
        samples: (M, 3, N), in the units of the reference.
        reference: (M, 3, N), shapes that the model was not trained on.
        distance: "chamfer" or "earth_mover".
        progress: see the distances.

    Raises:
        ValueError: the sets have different sizes, the distance is unknown, or see the distances.
    """
    if distance not in DISTANCES:
        raise ValueError(f"unknown distance {distance!r}; known: {', '.join(DISTANCES)}")
    measure = DISTANCES[distance]
    return scores_of(
        measure(samples, samples, progress=progress),
        measure(samples, reference, progress=progress),
        measure(reference, reference, progress=progress),
    )


def scores_of(within_samples: Tensor, across: Tensor, within_reference: Tensor) -> ShapeScores:
    """The measures of distances that are known.

    Where a cloud's nearest ones of both sets are equally far, it counts half to the accuracy.

    Source: Achlioptas et al. 2018, arXiv:1707.02392 (MMD and coverage); Lopez-Paz and Oquab 2017,
    arXiv:1610.06545, and Yang et al. 2019, arXiv:1906.12320 (1-NN accuracy).

    Args:
        within_samples: (M, M), symmetric; its diagonal is not used.
        across: (M, M), samples in rows and the reference in columns.
        within_reference: (M, M), as `within_samples`.

    Raises:
        ValueError: other shapes, fewer than 2 clouds in a set, or sets of different sizes.
    """
    number = len(across)
    shapes = [tuple(part.shape) for part in (within_samples, across, within_reference)]
    if number < 2 or shapes != [(number, number)] * 3:
        raise ValueError(
            "MMD, coverage and 1-NN accuracy compare two sets of the same size, at least 2 shapes each, got"
            f" {shapes[1][0]} samples and {shapes[1][-1]} of the reference, with distances {shapes}"
        )
    own = torch.cat([_nearest_other(within_samples), _nearest_other(within_reference)])
    foreign = torch.cat([across.amin(dim=1), across.amin(dim=0)])
    accuracy = (own < foreign).double() + (own == foreign).double() / 2
    return ShapeScores(
        mmd=float(across.amin(dim=0).mean()),
        coverage=len(across.argmin(dim=1).unique()) / number,
        one_nn_accuracy=float(accuracy.mean()),
    )


def _nearest_other(within: Tensor) -> Tensor:
    """Distance of each cloud to the nearest other one of its set, (M,)."""
    return (within + torch.diag(torch.full((len(within),), torch.inf, dtype=within.dtype))).amin(dim=1)


def _clouds(points: Tensor, name: str) -> _Points:
    """Points (M, 3, N) as a checked array (M, N, 3)."""
    if points.ndim != 3 or points.shape[1] != 3 or 0 in points.shape:
        raise ValueError(f"point clouds must be (M, 3, N), got {tuple(points.shape)} for the {name} set")
    broken = (~points.isfinite()).flatten(1).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(f"cloud {broken[0]} of the {name} set has points that are NaN or infinite")
    return np.ascontiguousarray(points.detach().cpu().double().mT.numpy())


def _directed(trees: _Points, clouds: _Points, progress: Progress | None) -> _Points:
    """Mean squared distance from the points of each of `clouds` to the nearest of each of `trees`, (M, R)."""
    from scipy.spatial import KDTree

    at_once = max(1, _BUDGET // clouds.shape[1])
    found = np.empty((len(trees), len(clouds)))
    for row, points in enumerate(trees):
        tree = KDTree(points)
        for start in range(0, len(clouds), at_once):
            distances, _ = tree.query(clouds[start : start + at_once], workers=-1)  # (K, N)
            found[row, start : start + at_once] = np.square(distances).mean(axis=1)
        if progress is not None:
            progress(1)
    return found
