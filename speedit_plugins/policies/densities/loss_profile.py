"""The mean loss at each noise level, learned from the losses of a training.

The laws and weights that follow the losses read it: `learned.py`, `progress.py`, and `learned.py` of the
weightings.

Dims: T timesteps, K bins, N losses.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.schedule import NoiseSchedule

# Losses enter a bin's mean in blocks of this size. Half of a block is enough to tell an outlier.
_BLOCK = 8


class LossProfile:
    """Running mean of the loss in each of K bins of equal width in log-SNR, read at every timestep.

    New losses weigh more, so the large ones of the first steps are soon forgotten: half of the weight lies on
    the newest sixth of what the bin has seen, and in the end on the newest 0.7 `window` losses. Losses enter
    in blocks of 8, block n with the share 4 / (n + 3).
    Source: Shamir & Zhang 2013, arXiv:1212.1824, polynomial-decay averaging.

    **Outliers.** A loss counts at most `outlier` times the median of its block, and a block at most `outlier`
    times the mean so far. A block below the mean by that factor starts the mean anew. So a huge loss counts
    as a large one, and a batch of huge losses raises a mean for a short time.

    **Noise.** A bin's mean averages 2 `window` losses in the end. If losses at one noise level have the
    standard deviation c times their mean (0.5 to 1 on images), the reading is off by c / sqrt(2 `window`):
    2 to 3 % with the defaults. Where the loss changes as exp(log-SNR), a bin of width b reads too high by
    about b^2 / 24: 2 % for 40 bins on a rectified flow of 1,000 timesteps.

    **What the losses contain.** A variational term that a host adds to its losses is part of the profile.

    Args:
        schedule: the noise schedule. A timestep with SNR 0 shares the noisiest bin.
        num_bins: bins between the schedule's ends, >= 1. Bins without a timestep are left out, so K may be
            smaller.
        window: losses after which a bin's mean has forgotten a change, >= 8.
        outlier: factor from which a loss counts as an outlier, > 1.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> profile = LossProfile(NoiseSchedule.cosine(2), num_bins=2)
        >>> profile.update(torch.tensor([0, 1]).repeat(8), torch.tensor([3.0, 1.0]).double().repeat(8))
        >>> profile.read().round(decimals=6).tolist()
        [3.0, 1.0]
    """

    def __init__(
        self, schedule: NoiseSchedule, *, num_bins: int = 40, window: int = 512, outlier: float = 10.0
    ) -> None:
        if not (num_bins >= 1 and window >= _BLOCK and outlier > 1):
            got = f"{num_bins}, {window} and {outlier}"
            raise ValueError(
                f"a loss profile needs num_bins >= 1, window >= {_BLOCK} and outlier > 1, got {got}"
            )
        # Rises with the index, as the bins do.
        self._noise_level = -finite_log_snr(schedule)
        place = self._noise_level - self._noise_level[0]
        place = (place * (num_bins / place[-1].clamp(min=1e-12))).long().clamp(max=num_bins - 1)
        #: Bin of each timestep, int64 in [0, K), shape (T,).
        self.bin_of = (place.diff(prepend=place[:1]) > 0).cumsum(0)
        counts = torch.bincount(self.bin_of)
        self._centre = torch.zeros(len(counts), dtype=torch.float64, device="cpu")
        self._centre.index_add_(0, self.bin_of, self._noise_level).div_(counts)
        self._slowest = _BLOCK / window
        self._outlier = outlier
        self._pending: list[list[float]] = [[] for _ in counts]
        self._mean = [float("nan")] * len(counts)
        self._num_blocks = [0] * len(counts)
        #: Losses seen so far.
        self.num_losses = 0

    @property
    def num_bins(self) -> int:
        """K, the number of bins that have a timestep."""
        return len(self._mean)

    def update(self, index: Tensor, loss: Tensor) -> None:
        """Adds losses of all ranks, float64 (N,), finite, at the indices (N,), both on the CPU.

        A negative loss counts as 0.
        """
        self.num_losses += len(index)
        places = self.bin_of[index].tolist()
        for place, value in zip(places, loss.clamp(min=0).tolist(), strict=True):
            pending = self._pending[place]
            pending.append(value)
            if len(pending) == _BLOCK:
                self._add_block(place, pending)
                self._pending[place] = []

    def _add_block(self, place: int, losses: list[float]) -> None:
        ordered = sorted(losses)
        highest = self._outlier * (ordered[_BLOCK // 2 - 1] + ordered[_BLOCK // 2]) / 2
        if ordered[-1] > highest:
            ordered = [min(loss, highest) for loss in ordered]
        block = sum(ordered) / _BLOCK
        mean, number = self._mean[place], self._num_blocks[place]
        if number == 0 or mean == 0 or self._outlier * block < mean:
            self._mean[place], self._num_blocks[place] = block, 1
            return
        share = max(4 / (number + 4), self._slowest)
        self._mean[place] = mean + share * (min(block, self._outlier * mean) - mean)
        self._num_blocks[place] = number + 1

    def bin_means(self) -> Tensor:
        """Mean loss of each bin, float64 (K,), NaN where a bin has not had 8 losses yet."""
        return torch.tensor(self._mean, dtype=torch.float64, device="cpu")

    def read(self) -> Tensor | None:
        """Mean loss at each timestep, > 0, float64 (T,). None before 8 K losses.

        Between the centres of the bins the logarithm is interpolated in log-SNR. A bin without a mean takes
        those of its neighbours, and the ends go on as they are.
        """
        if self.num_losses < _BLOCK * self.num_bins:
            return None
        # 8 K losses in K bins make at least one block, so some bin has a mean. Losses of 0 have no logarithm.
        smallest = torch.finfo(torch.float32).tiny
        return self.at_timesteps(self.bin_means().clamp(min=smallest).log()).exp()

    def at_timesteps(self, values: Tensor) -> Tensor:
        """One value for each bin (K,), NaN where unknown, interpolated in log-SNR at each timestep (T,)."""
        known = ~values.isnan()
        points, values = self._centre[known], values[known]
        if len(points) == 1:
            return values.expand(len(self._noise_level)).clone()
        right = torch.searchsorted(points, self._noise_level).clamp(1, len(points) - 1)
        start, end = points[right - 1], points[right]
        share = ((self._noise_level - start) / (end - start)).clamp(0, 1)
        return torch.lerp(values[right - 1], values[right], share)

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, for `load_state_dict`."""
        rows = [pending + [float("nan")] * (_BLOCK - len(pending)) for pending in self._pending]
        return {
            "mean": self.bin_means(),
            "num_blocks": torch.tensor(self._num_blocks, device="cpu"),
            "pending": torch.tensor(rows, dtype=torch.float64, device="cpu"),  # NaN where there is none
            "num_losses": self.num_losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state has another number of bins.
        """
        if len(state["mean"]) != self.num_bins:
            raise ValueError(f"a loss profile needs {self.num_bins} bins, got {len(state['mean'])}")
        self._mean = state["mean"].double().tolist()
        self._num_blocks = state["num_blocks"].tolist()
        self._pending = [row[~row.isnan()].tolist() for row in state["pending"].double()]
        self.num_losses = int(state["num_losses"])


class ProfiledTable:
    """A table (T,) that is computed from a loss profile, again after every few updates.

    Args:
        profile: what the losses are added to.
        table: the table before there is a profile, (T,).
        compute: function from the profile's reading (T,) to the table (T,).
        refresh_updates: updates from one table to the next, >= 1. A table costs several times an update.

    Raises:
        ValueError: `refresh_updates` < 1.

    Example:
        >>> profile = LossProfile(NoiseSchedule.cosine(2), num_bins=2)
        >>> follower = ProfiledTable(profile, torch.ones(2), torch.sqrt, refresh_updates=1)
        >>> follower.update(torch.tensor([0, 1]).repeat(8), torch.tensor([4.0, 1.0]).double().repeat(8))
        True
        >>> follower.table.round(decimals=6).tolist()
        [2.0, 1.0]
    """

    def __init__(
        self, profile: LossProfile, table: Tensor, compute: Callable[[Tensor], Tensor], refresh_updates: int
    ) -> None:
        if refresh_updates < 1:
            raise ValueError(f"a learned table needs refresh_updates >= 1, got {refresh_updates}")
        self.profile = profile
        self.table = table
        self._compute = compute
        self._refresh_updates = refresh_updates
        self._num_updates = 0

    def update(self, index: Tensor, loss: Tensor) -> bool:
        """Adds losses, as `LossProfile.update` does. True if the table is a new one."""
        self.profile.update(index, loss)
        self._num_updates += 1
        if self._num_updates % self._refresh_updates:
            return False
        reading = self.profile.read()
        if reading is None:
            return False
        self.table = self._compute(reading)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state as plain numbers and tensors, for `load_state_dict`."""
        state = {"table": self.table.clone(), "num_updates": self._num_updates}
        return {**state, "profile": self.profile.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state has another number of bins or timesteps.
        """
        if state["table"].shape != self.table.shape:
            wanted, got = tuple(self.table.shape), tuple(state["table"].shape)
            raise ValueError(f"a learned table needs shape {wanted}, got {got}")
        self.profile.load_state_dict(state["profile"])
        self.table, self._num_updates = state["table"].double().cpu().clone(), int(state["num_updates"])


def finite_log_snr(schedule: NoiseSchedule) -> Tensor:
    """log-SNR (T,), with that of the noisiest other timestep where the SNR is 0.

    Example:
        >>> finite_log_snr(NoiseSchedule.from_alphas_cumprod([0.5, 0.0])).tolist()
        [0.0, 0.0]
    """
    positive = schedule.log_snr[schedule.snr > 0]
    lowest = positive[-1] if len(positive) else torch.zeros_like(schedule.log_snr[0])
    return schedule.log_snr.clamp(min=float(lowest))
