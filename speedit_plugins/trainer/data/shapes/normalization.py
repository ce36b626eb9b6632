"""Mean and spread of a set of point clouds, and the step to unit variance and back.

Dims: S shapes, N points of each.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Number of points, and sums over them of the coordinates (3) and of all squared coordinates."""

    num_points: int
    sums: tuple[float, float, float]
    squares: float

    @classmethod
    def of(cls, points: Tensor) -> "Moments":
        """The moments of points (N, 3), summed in float64."""
        exact = points.double()
        x, y, z = exact.sum(dim=0).tolist()
        return cls(len(points), (x, y, z), float(exact.square().sum()))

    @classmethod
    def parse(cls, text: str) -> "Moments":
        """The moments that `str` wrote."""
        number, x, y, z, squares = text.split()
        return cls(int(number), (float(x), float(y), float(z)), float(squares))

    def __str__(self) -> str:
        return " ".join(map(repr, (self.num_points, *self.sums, self.squares)))


@dataclass(frozen=True)
class Normalization:
    """Points in the data's units become (points - mean) / std, and samples of a model go back.

    Args:
        mean: the mean point of the data set.
        std: one number for all three axes, > 0, so that shapes keep their proportions.

    Example:
        >>> Normalization((1.0, 0.0, 0.0), 2.0).apply(torch.tensor([[5.0], [2.0], [0.0]])).flatten().tolist()
        [2.0, 1.0, 0.0]
    """

    mean: tuple[float, float, float]
    std: float

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or not all(map(math.isfinite, (*self.mean, self.std))) or self.std <= 0:
            raise ValueError(
                "a normalization of points needs a finite mean of 3 numbers and a std > 0, got"
                f" {list(self.mean)} and {self.std}"
            )

    @classmethod
    def given(cls, mean: Sequence[float] | None, std: float | None) -> "Normalization | None":
        """The normalization of a config's `mean` and `std`; None if both are None.

        Raises:
            ValueError: only one of them is given, or a value is invalid.
        """
        if mean is None and std is None:
            return None
        if mean is None or std is None:
            raise ValueError(f"a data set of points needs both mean and std, or none, got {mean} and {std}")
        return cls(tuple(map(float, mean)), float(std))  # type: ignore[arg-type]  # its length is checked there

    @classmethod
    def of(cls, moments: Iterable[Moments]) -> "Normalization":
        """The normalization of all points together: the mean of each axis, and one standard deviation.

        The deviation is that of the list of all coordinates around its one mean, as in PointFlow's data set,
        so the result has a variance a little below 1 if the axes have different means.

        Source: Yang et al. 2019, arXiv:1906.12320, and the loaders of PointFlow and DiT-3D.

        Raises:
            ValueError: all points are at one place, or too far from 0 for a spread in float64.
        """
        found = list(moments)
        number = sum(part.num_points for part in found)
        x, y, z = (math.fsum(part.sums[axis] for part in found) for axis in range(3))
        centre = (x + y + z) / (3 * number)
        variance = math.fsum(part.squares for part in found) / (3 * number) - centre**2
        if not variance > 0:
            mean = [x / number, y / number, z / number]
            raise ValueError(
                f"the {number} points of the data set are all at one place, or too far from 0"
                f" to tell apart: their mean is {mean}"
            )
        return cls((x / number, y / number, z / number), math.sqrt(variance))

    def apply(self, points: Tensor) -> Tensor:
        """Points in the data's units (..., 3, N) as the model sees them."""
        return (points - self._mean(points)) / self.std

    def invert(self, points: Tensor) -> Tensor:
        """Points of the model (..., 3, N) in the data's units."""
        return points * self.std + self._mean(points)

    def _mean(self, points: Tensor) -> Tensor:
        return torch.tensor(self.mean, dtype=points.dtype, device=points.device).unsqueeze(-1)  # (3, 1)
