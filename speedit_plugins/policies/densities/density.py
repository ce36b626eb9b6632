"""A density: the probability of drawing each timestep.

Densities by formula are in `over_time.py`, `over_log_snr.py` and `areas.py`, those that change during
training in `adaptive.py`, `learned.py`, `progress.py` and `auto.py`. `cumulative.py` makes a table from the
two tails of a law.

Dims: T timesteps.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Density:
    """Probability of drawing each index.

    Args:
        table: probabilities, >= 0, shape (T,) float64. The constructor divides them by their sum.
        boundary_index: first index past the density's boundary between two areas, None if it has none.
        is_relative: whether the table only says how much rarer some timesteps become. A flow host keeps its
            own law then, and the table thins it. Any other density replaces the host's law.

    Raises:
        ValueError: a value that is negative or not finite, or a sum of 0.

    Example:
        >>> Density(torch.tensor([1.0, 3.0])).table.tolist()
        [0.25, 0.75]
    """

    table: Tensor
    boundary_index: int | None = None
    is_relative: bool = False

    def __post_init__(self) -> None:
        total = self.table.sum()
        if not (torch.isfinite(total) and total > 0 and (self.table >= 0).all()):
            raise ValueError(f"a density needs finite values >= 0 with a positive sum, got sum {total:g}")
        object.__setattr__(self, "table", self.table / total)
