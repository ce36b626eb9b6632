"""The spectrum of the data, measured on the batches of the first training steps, on all ranks.

Dims: B batch, N samples, d values of a sample.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from speedit_plugins.policies.distributed import gather_rows, num_processes
from speedit_plugins.policies.spectrum import DataSpectrum

# 128 MiB of float32, on a rank before the measurement and on each rank at its end. For a moment the spectrum
# takes twice as much, as float64.
MAX_VALUES = 2**25
# Two samples are the same if their squared distance is below this share of the mean one. In a small data set,
# whose samples come again and again, the second share allows for the noise of an encoder.
_SAME, _ENCODED_AGAIN = 1e-5, 1e-2


class DataMeasurement:
    """Keeps samples of the first batches until all ranks together have enough for a spectrum.

    The ranks talk to each other after 4, 8, 16, ... batches, until there are enough samples, or `num_steps`
    batches. Only finite samples count, of the shape that is most frequent on rank 0. A sample that comes
    again, as in a small data set, or on a rank that shares its batch, counts once. All ranks get the same
    spectrum. Large images, of which there are too few, get `DataSpectrum.of_stationary`.

    Args:
        num_samples: N to wait for, >= 2; fewer if they would take more than `MAX_VALUES` values.
        num_steps: batches after which it is measured on what there is, >= 4, a power of two.

    Example:
        >>> measurement = DataMeasurement(num_samples=200)
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = [measurement.add(torch.randn(50, 3, generator=generator)) for _ in range(4)]
        >>> found[2] is None, len(found[3].variances), measurement.shape
        (True, 199, (3,))
    """

    def __init__(self, num_samples: int = 1024, num_steps: int = 256) -> None:
        self._wanted, self._num_steps = num_samples, num_steps
        self._rows: dict[tuple[int, ...], list[Tensor]] = {}
        self._num_values = self._step = 0
        # What was measured, in the end.
        self.shape: tuple[int, ...] = ()
        self.num_samples = 0

    def add(self, data: Tensor) -> DataSpectrum | None:
        """Takes a batch (B, ...); returns the spectrum once there is enough. Waits for the device.

        Raises:
            ValueError: samples from which no middle can be measured, see `DataSpectrum`.
        """
        self._step += 1
        self._keep(data)
        if self._step < 4 or self._step & (self._step - 1):
            return None
        rows = self._of_all_ranks(data.device)
        wanted = self._num_wanted(rows.shape[1])
        if len(rows) < wanted and self._step < self._num_steps:
            return None
        self._rows = {}
        if len(rows) < 2:
            raise ValueError(f"{self._step} batches have fewer than two finite samples of one shape")
        samples = _distinct(rows[:wanted])
        self.num_samples = len(samples)
        spectrum = DataSpectrum.of(samples)
        try:
            spectrum.log_snr_at()
        except ValueError:
            if len(self.shape) < 2:
                raise
            spectrum = DataSpectrum.of_stationary(samples.view(-1, *self.shape))
        return spectrum

    def _num_wanted(self, num_values: int) -> int:
        """How many samples of so many values to wait for."""
        return min(self._wanted, max(2, MAX_VALUES // max(1, num_values)))

    def _keep(self, data: Tensor) -> None:
        rows = data.detach().flatten(1).float()
        kept = self._rows.setdefault(tuple(data.shape[1:]), [])
        room = min(self._wanted - len(kept), (MAX_VALUES - self._num_values) // max(1, rows.shape[1]))
        if room > 0:
            rows = rows[:room].cpu()
            kept.extend(row.clone() for row in rows[rows.isfinite().all(dim=1)])
            self._num_values += rows.numel()

    def _of_all_ranks(self, device: torch.device) -> Tensor:
        """Rows (N, d) of the shape that is most frequent on rank 0, an equal part from each rank."""
        most = max(self._rows, key=lambda shape: len(self._rows[shape]))
        if num_processes() == 1:
            self.shape = most
            return _stacked(self._rows[most], most)
        # The collectives of NCCL want memory of its devices.
        place = torch.device("cuda") if dist.get_backend() == "nccl" else device
        self.shape = _of_rank_0(most, place)
        part = math.ceil(self._num_wanted(math.prod(self.shape)) / num_processes())
        rows = _stacked(self._rows.get(self.shape, [])[:part], self.shape)
        return gather_rows(rows.to(place)).cpu()


def equal_on_all_ranks(value: float, device: torch.device) -> float:
    """The value of rank 0. Processors of different makers may differ in its last bits."""
    if num_processes() == 1:
        return value
    place = torch.device("cuda") if dist.get_backend() == "nccl" else device
    # Two halves: mps has no float64.
    whole = torch.tensor([value], dtype=torch.float64)
    both = torch.stack([whole.float(), (whole - whole.float()).float()]).to(place)
    dist.broadcast(both, src=0)
    return float(both.cpu().double().sum())


def _of_rank_0(shape: tuple[int, ...], device: torch.device) -> tuple[int, ...]:
    """The shape (at most 7 sides) of rank 0."""
    row = torch.zeros(8, dtype=torch.int64)
    row[: 1 + len(shape)] = torch.tensor([len(shape), *shape])
    row = row.to(device)
    dist.broadcast(row, src=0)
    num_dims, *sizes = row.tolist()
    return tuple(sizes[:num_dims])


def _stacked(rows: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, math.prod(shape))


def _distinct(rows: Tensor) -> Tensor:
    """The samples (N, d) without those that are the same as an earlier one."""
    centred = rows - rows.mean(dim=0)
    squares = (centred**2).sum(dim=1)
    distance = squares[:, None] + squares - 2 * centred @ centred.T  # (N, N)
    distance /= (2 * squares.mean()).clamp(min=1e-30)
    later = torch.ones_like(distance).triu().bool()
    nearest = distance.masked_fill(later, 1.0).amin(dim=1)  # to the samples before it
    again = nearest < _ENCODED_AGAIN
    # Samples with few values are near each other by chance. Most of them are so only if they come again.
    return rows[~again] if 2 * again.sum() > len(rows) else rows[nearest >= _SAME]
