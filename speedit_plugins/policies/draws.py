"""How independently drawn indices become a batch: as they are, or paired with their reflections.

Dims: T timesteps, B batch.
"""

import torch
from torch import Tensor

from speedit_plugins.policies.densities.areas import push_reflected, reflect, reflection_pivot
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DRAWS


class Iid:
    """Independent draws: each index of the batch follows the density.

    Example:
        >>> index, jitter = Iid().pair(torch.tensor([3, 1]), torch.tensor([0.5, 0.5]))
        >>> index.tolist()
        [3, 1]
    """

    def marginal(self, table: Tensor, batch_size: int | None) -> Tensor:
        """Distribution (T,) of one index of a batch: the density `table` (T,), whatever the batch size."""
        return table

    def pair(self, index: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """The index (B,) and the jitter (B,), unchanged."""
        return index, jitter


class Paired:
    """Paired draws: the second half of the batch holds the reflections of the first half.

    A batch has n_d = min(B, B // 2 + 1) direct draws from p, then their reflections at the pivot, cut to B.
    One index of the batch follows [n_d p + (B - n_d) R p] / B, so its distribution depends on the batch size.
    This reproduces published code. Source: the SpeeDiT README.

    Args:
        threshold: slope of sqrt(1 - alpha-bar) per u, > 0. The pivot is where the slope falls below it.

    Raises:
        ValueError: `threshold` <= 0.

    Example:
        >>> paired = Paired(NoiseSchedule.linear(1000))  # pivot 642
        >>> index, jitter = paired.pair(torch.tensor([0, 700, 2, 3]), torch.zeros(4))
        >>> index.tolist()
        [0, 700, 2, 642]
    """

    def __init__(self, schedule: NoiseSchedule, *, threshold: float = 0.1) -> None:
        if not threshold > 0:
            raise ValueError(f"paired needs threshold > 0, got {threshold}")
        self._pivot = reflection_pivot(schedule, threshold=threshold)
        self._num_timesteps = schedule.num_timesteps

    def marginal(self, table: Tensor, batch_size: int | None) -> Tensor:
        """Distribution (T,) of one index of a batch of this size. Direct draws follow `table` (T,).

        Args:
            table: density of the direct draws, shape (T,).
            batch_size: B >= 1; None is the limit of large batches.
        """
        direct = 0.5 if batch_size is None else self._num_direct(batch_size) / batch_size
        return direct * table + (1 - direct) * push_reflected(table, self._pivot)

    def pair(self, index: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """The index (B,) with its second half replaced by reflections, and the jitter (B,) unchanged."""
        direct = index[: self._num_direct(len(index))]
        mirrored = reflect(direct, self._pivot, self._num_timesteps)
        return torch.cat([direct, mirrored])[: len(index)], jitter

    @staticmethod
    def _num_direct(batch_size: int) -> int:
        return min(batch_size, batch_size // 2 + 1)


def drawing_device(device: torch.device | str) -> torch.device:
    """Where the random numbers for draws on a device are made: there, or the CPU for mps (no float64)."""
    target = torch.device(device)
    return torch.device("cpu") if target.type == "mps" else target


DRAWS.register_module(name="iid", module=Iid)
DRAWS.register_module(name="paired", module=Paired)
