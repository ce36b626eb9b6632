"""From independent draws to the batch that is trained on.

Dims: T timesteps, B batch.
"""

import torch
from torch import Tensor

from speedit_plugins.policies.densities import push_reflected, reflect, reflection_pivot
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DRAWS


class Iid:
    """Every index of the batch has the density's law, independently."""

    def marginal(self, table: Tensor, batch_size: int | None) -> Tensor:
        """Law (T,) of an index in a batch of this size: the density `table` (T,) itself."""
        return table

    def pair(self, index: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """Index (B,) and jitter (B,), unchanged."""
        return index, jitter


class Paired:
    """The README's pairing: B // 2 + 1 direct draws, then their reflections at the pivot, cut to B.

    The marginal is the mixture [n_d p + (B - n_d) R p] / B, n_d = min(B, B // 2 + 1): it depends on the batch
    size. Exists to reproduce published code: the second half of each batch mirrors the first.

    Args:
        threshold: slope of sqrt(1 - alpha-bar) per u whose crossing sets the pivot, > 0.
    """

    def __init__(self, schedule: NoiseSchedule, *, threshold: float = 0.1) -> None:
        if not threshold > 0:
            raise ValueError(f"paired needs threshold > 0, got {threshold}")
        self._pivot = reflection_pivot(schedule, threshold=threshold)
        self._num_timesteps = schedule.num_timesteps

    def marginal(self, table: Tensor, batch_size: int | None) -> Tensor:
        """Law (T,) of an index in a batch of this size (None: large), direct draws following `table` (T,)."""
        direct = 0.5 if batch_size is None else self._num_direct(batch_size) / batch_size
        return direct * table + (1 - direct) * push_reflected(table, self._pivot)

    def pair(self, index: Tensor, jitter: Tensor) -> tuple[Tensor, Tensor]:
        """Index (B,) whose second half mirrors the first, and the jitter (B,)."""
        direct = index[: self._num_direct(len(index))]
        mirrored = reflect(direct, self._pivot, self._num_timesteps)
        return torch.cat([direct, mirrored])[: len(index)], jitter

    @staticmethod
    def _num_direct(batch_size: int) -> int:
        return min(batch_size, batch_size // 2 + 1)


DRAWS.register_module(name="iid", module=Iid)
DRAWS.register_module(name="paired", module=Paired)
