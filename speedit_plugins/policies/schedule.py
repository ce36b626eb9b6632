"""The noise schedule: how much signal and noise a diffusion process has at each timestep.

A sample at timestep t is x_t = alpha_t x_0 + sigma_t eps. Index 0 is the cleanest timestep.

Derivatives are taken "per u", where u = original timestep / number of original timesteps. A slope per u is
the same for 100 timesteps as for 4,000, so one threshold serves every T.

Dims: T timesteps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "x0", "v", "flow")

# SNR = 1/143 is sqrt(alpha-bar) = 1/12. On the linear schedule with T = 1000 this is the paper's tau = 700.
CONVERGENCE_SNR = 1 / 143

# Tables are float64 on the CPU, whatever torch's default device and dtype are.
_CPU: Any = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """Signal scale and noise scale at every timestep, float64 on the CPU.

    Most code calls a constructor: `linear`, `scaled_linear`, `cosine`, `rectified_flow`, `from_betas` or
    `from_alphas_cumprod`.

    Args:
        alpha: signal scale, shape (T,), >= 0. A last value of 0 means zero terminal SNR.
        sigma: noise scale, shape (T,), > 0. alpha / sigma must not rise with the index.
        timesteps: original timestep of each index, shape (T,) int64, strictly rising in [0, num_original).
            The model embeds this number. It differs from the index on a respaced schedule.
        num_original: number of timesteps before respacing.

    Raises:
        ValueError: a table has the wrong shape, range or order.

    Example:
        >>> schedule = NoiseSchedule.linear(1000)
        >>> schedule.alphas_cumprod.shape, schedule.acceleration_index, schedule.convergence_index()
        (torch.Size([1000]), 219, 700)
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor
    num_original: int

    def __post_init__(self) -> None:
        T = self.alpha.numel()
        for name, table in (("alpha", self.alpha), ("sigma", self.sigma), ("timesteps", self.timesteps)):
            if table.shape != (T,) or T == 0:
                raise ValueError(
                    f"{name} needs shape (T,) with T >= 1, got {tuple(table.shape)}, alpha has T = {T}"
                )
        if not (torch.isfinite(self.alpha).all() and (self.alpha >= 0).all()):
            raise ValueError("alpha needs finite values >= 0")
        if not (torch.isfinite(self.sigma).all() and (self.sigma > 0).all()):
            raise ValueError(
                "sigma needs finite values > 0: a step without noise has no finite SNR and nothing to learn"
            )
        if (self.snr.diff() > 0).any():
            raise ValueError(
                "the SNR needs to fall with the index (0 is the cleanest step), got a rising one"
            )
        steps = self.timesteps
        if (steps.diff() <= 0).any() or steps[0] < 0 or steps[-1] >= self.num_original:
            raise ValueError(
                f"timesteps need to rise strictly in [0, {self.num_original}), got {steps.tolist()[:8]}..."
            )

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02
    ) -> "NoiseSchedule":
        """DDPM's schedule: beta rises linearly.

        Source: Ho et al. 2020, arXiv:2006.11239. Scaling by 1000 / T follows guided-diffusion.

        Args:
            num_timesteps: T, >= 20 with the default betas.
            beta_start: first beta at T = 1000. Other T scale it by 1000 / T.
            beta_end: last beta at T = 1000. Other T scale it by 1000 / T.

        Raises:
            ValueError: a scaled beta is outside (0, 1].

        Example:
            >>> NoiseSchedule.linear(1000)
            NoiseSchedule(T = 1000, SNR 1e+04 to 4.04e-05)
        """
        scale = _beta_scale(num_timesteps, beta_start, beta_end)
        return cls.from_betas(torch.linspace(scale * beta_start, scale * beta_end, num_timesteps, **_CPU))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Stable Diffusion's schedule: sqrt(beta) rises linearly.

        Source: Rombach et al. 2022, arXiv:2112.10752 (latent-diffusion configs).

        Args:
            num_timesteps: T, >= 12 with the default betas.
            beta_start: first beta at T = 1000. Other T scale it by 1000 / T.
            beta_end: last beta at T = 1000. Other T scale it by 1000 / T.

        Raises:
            ValueError: a scaled beta is outside (0, 1].

        Example:
            >>> NoiseSchedule.scaled_linear(1000)
            NoiseSchedule(T = 1000, SNR 1.18e+03 to 0.00468)
        """
        scale = _beta_scale(num_timesteps, beta_start, beta_end)
        start, end = math.sqrt(scale * beta_start), math.sqrt(scale * beta_end)
        return cls.from_betas(torch.linspace(start, end, num_timesteps, **_CPU) ** 2)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999
    ) -> "NoiseSchedule":
        """IDDPM's schedule: alpha-bar is a squared cosine of u.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17.

        Args:
            num_timesteps: T, >= 1.
            offset: shift of u, so that the first betas are not too small.
            max_beta: upper limit of every beta, in (0, 1].

        Raises:
            ValueError: T < 1, or a beta outside (0, 1].

        Example:
            >>> NoiseSchedule.cosine(1000).convergence_index()
            946
        """
        _check_num_timesteps(num_timesteps)
        u = torch.arange(num_timesteps + 1, **_CPU) / num_timesteps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    @classmethod
    def rectified_flow(cls, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Straight path x_t = (1 - t) x_0 + t eps, read at the bin midpoints t = (index + 1/2) / T.

        The midpoints keep the SNR finite and above 0. Here t = 0 is clean.
        Source: Liu et al. 2022, arXiv:2209.03003.

        Args:
            num_timesteps: T, >= 1.

        Raises:
            ValueError: T < 1.

        Example:
            >>> NoiseSchedule.rectified_flow(4).sigma.tolist()
            [0.125, 0.375, 0.625, 0.875]
        """
        _check_num_timesteps(num_timesteps)
        t = (torch.arange(num_timesteps, **_CPU) + 0.5) / num_timesteps
        return cls(1 - t, t, torch.arange(num_timesteps, device="cpu"), num_timesteps)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> "NoiseSchedule":
        """Variance-preserving schedule with these betas.

        Args:
            betas: beta of each index, in (0, 1], shape (T,).

        Raises:
            ValueError: wrong shape or range.

        Example:
            >>> NoiseSchedule.from_betas([0.5, 0.5]).alphas_cumprod.round(decimals=6).tolist()
            [0.5, 0.25]
        """
        table = torch.as_tensor(betas, **_CPU)
        if table.ndim != 1 or not ((table > 0) & (table <= 1)).all():
            raise ValueError(f"betas need shape (T,) and values in (0, 1], got {_span(table)}")
        return cls.from_alphas_cumprod(torch.cumprod(1 - table, dim=0))

    @classmethod
    def from_alphas_cumprod(
        cls,
        alphas_cumprod: Tensor | Sequence[float],
        timesteps: Tensor | Sequence[int] | None = None,
        num_original: int | None = None,
    ) -> "NoiseSchedule":
        """Variance-preserving schedule with these values of alpha-bar.

        Args:
            alphas_cumprod: alpha-bar of each index, in [0, 1), falling, shape (T,).
            timesteps: original timestep of each index of a respaced schedule, shape (T,).
            num_original: number of timesteps before respacing. Required with `timesteps`.

        Raises:
            ValueError: wrong shape, range or order, or only one of `timesteps` and `num_original`.

        Example:
            >>> NoiseSchedule.from_alphas_cumprod([0.75, 0.5]).snr.round(decimals=6).tolist()
            [3.0, 1.0]
        """
        table = torch.as_tensor(alphas_cumprod, **_CPU)
        if table.ndim != 1 or not ((table >= 0) & (table < 1)).all():
            raise ValueError(f"alphas_cumprod needs shape (T,) and values in [0, 1), got {_span(table)}")
        if (timesteps is None) != (num_original is None):
            raise ValueError("timesteps and num_original describe one respacing: give both or neither")
        steps = (
            torch.arange(len(table), device="cpu")
            if timesteps is None
            else torch.as_tensor(timesteps, dtype=torch.int64, device="cpu")
        )
        return cls(
            table.sqrt(), (1 - table).sqrt(), steps, len(table) if num_original is None else num_original
        )

    def respaced(self, indices: Sequence[int]) -> "NoiseSchedule":
        """The schedule reduced to some of its indices. `timesteps` keeps the original numbers.

        Args:
            indices: the indices to keep, rising, in [0, T).

        Raises:
            ValueError: an index out of range or out of order, or no index.

        Example:
            >>> NoiseSchedule.linear(1000).respaced([0, 500, 999]).timesteps.tolist()
            [0, 500, 999]
        """
        keep = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if keep.ndim != 1 or keep.numel() == 0 or keep.min() < 0 or keep.max() >= self.num_timesteps:
            raise ValueError(
                f"respaced needs indices in [0, {self.num_timesteps}), got {list(indices)[:8]}..."
            )
        return NoiseSchedule(self.alpha[keep], self.sigma[keep], self.timesteps[keep], self.num_original)

    def zero_terminal_snr(self) -> "NoiseSchedule":
        """The schedule with SNR 0 at its end: sqrt(alpha-bar) is shifted and scaled, its first value kept.

        A model of epsilon cannot be sampled on it, because noise alone does not determine x_0. Call this
        before `respaced`.
        Source: Lin et al. 2023, arXiv:2305.08891, algorithm 1.

        Raises:
            ValueError: the schedule is not variance-preserving, or its first and last SNR are equal.

        Example:
            >>> schedule = NoiseSchedule.from_alphas_cumprod([0.81, 0.25, 0.01])  # roots 0.9, 0.5 and 0.1
            >>> schedule.zero_terminal_snr().alpha.round(decimals=6).tolist()
            [0.9, 0.45, 0.0]
        """
        if not self.is_variance_preserving:
            raise ValueError("zero_terminal_snr needs a variance-preserving schedule, got one that is not")
        root = self.alphas_cumprod.sqrt()
        if root[0] == root[-1]:
            raise ValueError("zero_terminal_snr needs an SNR that falls, got the same at both ends")
        shifted = (root - root[-1]) / (root[0] - root[-1]) * root[0]
        return NoiseSchedule.from_alphas_cumprod(shifted**2, self.timesteps, self.num_original)

    def __repr__(self) -> str:
        return f"NoiseSchedule(T = {self.num_timesteps}, SNR {self.snr[0]:.3g} to {self.snr[-1]:.3g})"

    @property
    def num_timesteps(self) -> int:
        """T, the number of indices that can be drawn."""
        return self.alpha.numel()

    @cached_property
    def is_variance_preserving(self) -> bool:
        """Whether alpha^2 + sigma^2 = 1 at every index, as in DDPM."""
        return torch.allclose(self.alpha**2 + self.sigma**2, torch.ones_like(self.alpha))

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha-bar = alpha^2 / (alpha^2 + sigma^2) in [0, 1), shape (T,)."""
        return self.alpha**2 / (self.alpha**2 + self.sigma**2)

    @cached_property
    def snr(self) -> Tensor:
        """alpha^2 / sigma^2, finite and >= 0, shape (T,)."""
        return (self.alpha / self.sigma) ** 2

    @cached_property
    def log_snr(self) -> Tensor:
        """ln SNR, shape (T,); -inf at a zero-terminal-SNR end."""
        return self.snr.log()

    def gradient(self, table: Tensor) -> Tensor:
        """Slope of a table per u, shape (T,): d table / du.

        Differences run over the original timesteps and are second order inside the schedule. A respaced
        schedule has gaps of different lengths, so differences over the index would be wrong.

        Args:
            table: one value for each index, shape (T,).

        Raises:
            ValueError: T < 2.

        Example:
            >>> schedule = NoiseSchedule.rectified_flow(4)
            >>> schedule.gradient(schedule.sigma).tolist()  # sigma = (index + 1/2) / T
            [1.0, 1.0, 1.0, 1.0]
        """
        if self.num_timesteps < 2:
            raise ValueError(f"a derivative along the schedule needs T >= 2, got T = {self.num_timesteps}")
        return torch.gradient(table, spacing=(self.timesteps.to(table),))[0] * self.num_original

    @cached_property
    def acceleration_index(self) -> int:
        """Index in [0, T) at which 1 - alpha-bar rises fastest: the deceleration area begins here.

        Source: Wang et al. 2024, arXiv:2405.17403.
        """
        return int(self.gradient(1 - self.alphas_cumprod).argmax())

    def convergence_index(self, snr: float = CONVERGENCE_SNR) -> int:
        """First index of the convergence area, tau in [0, T]: the number of indices with at least this SNR.

        Args:
            snr: the area begins where the SNR falls below this value, > 0.

        Raises:
            ValueError: `snr` <= 0.

        Example:
            >>> NoiseSchedule.rectified_flow(1000).convergence_index()
            923
        """
        if not snr > 0:
            raise ValueError(f"the SNR boundary needs to be > 0, got {snr}")
        # alpha-bar / (1 - alpha-bar) and alpha^2 / sigma^2 round differently, so the comparison has slack.
        return int((self.snr >= snr * (1 - 1e-12)).sum())

    def flat_index(self, threshold: float = 0.1) -> int:
        """First index at which sqrt(1 - alpha-bar) has become flat, T if there is none.

        Flat means: past the steepest point, with a slope per u below the threshold.

        Example:
            >>> NoiseSchedule.linear(1000).flat_index(0.1)
            641
        """
        slope = self.gradient((1 - self.alphas_cumprod).sqrt())
        steepest = int(slope.argmax())
        flat = (slope[steepest:] < threshold).nonzero()
        return steepest + int(flat[0]) if len(flat) else self.num_timesteps


def _check_num_timesteps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps needs to be >= 1, got {num_timesteps}")


def _beta_scale(num_timesteps: int, beta_start: float, beta_end: float) -> float:
    _check_num_timesteps(num_timesteps)
    scale = 1000 / num_timesteps
    if not 0 < scale * beta_start <= scale * beta_end <= 1:
        raise ValueError(
            f"betas scaled by 1000 / T need 0 < start <= end <= 1, got {scale * beta_start:g} and"
            f" {scale * beta_end:g} at T = {num_timesteps}: needs T >= {math.ceil(1000 * beta_end)}"
        )
    return scale


def _span(table: Tensor) -> str:
    known = table.ndim == 1 and table.numel() > 0
    return f"values from {table.min():g} to {table.max():g}" if known else f"shape {tuple(table.shape)}"
