"""Quantiles of measured values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def quantiles(values: Sequence[float], shares: Sequence[float]) -> list[float]:
    """The quantiles of one value or more at shares in [0, 1], interpolated between the values."""
    ordered = torch.tensor(values, dtype=torch.float64)
    return torch.quantile(ordered, torch.tensor(shares, dtype=torch.float64)).tolist()


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of one value or more, interpolated between the values."""
        return cls(*quantiles(values, (0.25, 0.5, 0.75)))

    def times(self, factor: float) -> "Spread":
        """The same spread in another unit."""
        return Spread(factor * self.low, factor * self.median, factor * self.high)
