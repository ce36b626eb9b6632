"""The spectrum of the data, measured on the batches of the first training steps, on all ranks.

Dims: B batch, N samples, d values of a sample.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from speedit_plugins.policies.distributed import gather_rows
from speedit_plugins.policies.spectrum import DataSpectrum

# 128 MiB of float32. The spectrum takes twice as much for a moment, as float64.
MAX_VALUES = 2**25


class DataMeasurement:
    """Keeps the samples of the first batches until they are enough for a spectrum.

    Only samples of one shape count, that of the first batch of rank 0, and only finite ones. A sample that
    comes again, in a later epoch or on a rank that shares its batch, counts once. All ranks get the same
    spectrum.

    Args:
        num_samples: N to wait for, >= 2; fewer if they would take more than `MAX_VALUES` values.
        num_steps: batches after which it is measured on what there is, >= 1.

    Example:
        >>> measurement = DataMeasurement(num_samples=200)
        >>> generator = torch.Generator().manual_seed(0)
        >>> measurement.add(torch.randn(100, 3, generator=generator)) is None
        True
        >>> spectrum = measurement.add(torch.randn(100, 3, generator=generator))
        >>> len(spectrum.variances), measurement.shape
        (199, (3,))
    """

    def __init__(self, num_samples: int = 1024, num_steps: int = 256) -> None:
        self._num_samples, self._num_steps = num_samples, num_steps
        self._rows: list[Tensor] = []
        self._keys: set[str] = set()
        self._step = 0
        self.shape: tuple[int, ...] = ()

    @property
    def num_samples(self) -> int:
        """Samples kept so far."""
        return len(self._keys)

    def add(self, data: Tensor) -> DataSpectrum | None:
        """Takes a batch (B, ...); returns the spectrum once there is enough. Collective.

        Raises:
            ValueError: samples from which no spectrum can be measured, see `DataSpectrum.of`.
        """
        if self._step == 0:
            self.shape = _of_rank_0(data)
        self._step += 1
        values = self.shape and torch.Size(self.shape).numel() or 1
        rows = data.detach().flatten(1) if tuple(data.shape[1:]) == self.shape else data.new_zeros(0, values)
        self._keep(gather_rows(rows.float()).cpu())
        wanted = min(self._num_samples, MAX_VALUES // values)
        if self.num_samples < wanted and self._step < self._num_steps:
            return None
        if not self._rows:
            raise ValueError(f"none of the samples of {self._step} batches has finite values")
        samples = torch.stack(self._rows)
        self._rows = []
        return DataSpectrum.of(samples)

    def _keep(self, rows: Tensor) -> None:
        # Two samples with the same sum of values times their position are the same sample. Its last digits
        # depend on the batch.
        sums = rows.double() @ torch.linspace(1, 2, rows.shape[1], dtype=torch.float64)
        for row, value in zip(rows, sums.tolist(), strict=True):
            key = f"{value:.10g}"
            if math.isfinite(value) and key not in self._keys and len(self._rows) < self._num_samples:
                self._keys.add(key)
                self._rows.append(row.clone())


def equal_on_all_ranks(value: float, device: torch.device) -> float:
    """The value of rank 0. Processors of different makers may differ in its last bits."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    # Two halves: mps has no float64.
    high = torch.tensor([value], dtype=torch.float64).float()
    both = torch.stack([high, (torch.tensor([value], dtype=torch.float64) - high).float()]).to(device)
    dist.broadcast(both, src=0)
    return float(both.cpu().double().sum())


def _of_rank_0(data: Tensor) -> tuple[int, ...]:
    """The shape of a sample of rank 0."""
    shape = tuple(data.shape[1:])
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return shape
    row = torch.zeros(8, dtype=torch.int64)
    row[: 1 + len(shape)] = torch.tensor([len(shape), *shape])
    row = row.to(data.device)
    dist.broadcast(row, src=0)
    num_dims, *sizes = row.tolist()
    return tuple(sizes[:num_dims])
