"""The noise schedule: how much signal and noise a diffusion process has at each timestep.

x_t = alpha_t x_0 + sigma_t eps, index 0 is the cleanest step. Derivatives are taken "per u", u = original
timestep / their number, which makes every threshold of the method independent of T.

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

# sqrt(alpha-bar) = 1/12 puts the boundary of the linear T = 1000 schedule at exactly the paper's tau = 700.
CONVERGENCE_SNR = 1 / 143

# Tables are built on the CPU in double precision whatever torch's default device and dtype are.
_CPU: Any = {"dtype": torch.float64, "device": "cpu"}


@dataclass(frozen=True, eq=False, repr=False)
class NoiseSchedule:
    """Signal and noise scale of every timestep, float64 on the CPU.

    Args:
        alpha: scale of x_0, shape (T,), >= 0; a final 0 is a zero-terminal-SNR schedule.
        sigma: scale of the noise, shape (T,), > 0; alpha / sigma never rises.
        timesteps: original timestep behind each index (what a model embeds), shape (T,) int64, strictly
            rising in [0, num_original); not `arange(T)` where the schedule is respaced.
        num_original: number of timesteps before respacing.

    Raises:
        ValueError: a shape, range or order above does not hold.
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
        """DDPM's linear beta schedule; beta end points are given for T = 1000 and scaled by 1000 / T.

        Source: Ho et al. 2020, arXiv:2006.11239; the scaling as in guided-diffusion.

        Raises:
            ValueError: the scaled end points leave (0, 1]; with the default end points, T < 20.
        """
        scale = _beta_scale(num_timesteps, beta_start, beta_end)
        return cls.from_betas(torch.linspace(scale * beta_start, scale * beta_end, num_timesteps, **_CPU))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> "NoiseSchedule":
        """Stable Diffusion's schedule: linear in sqrt(beta); end points scaled by 1000 / T.

        Source: Rombach et al. 2022, arXiv:2112.10752 (latent-diffusion configs).

        Raises:
            ValueError: the scaled end points leave (0, 1]; with the default end points, T < 12.
        """
        scale = _beta_scale(num_timesteps, beta_start, beta_end)
        start, end = math.sqrt(scale * beta_start), math.sqrt(scale * beta_end)
        return cls.from_betas(torch.linspace(start, end, num_timesteps, **_CPU) ** 2)

    @classmethod
    def cosine(
        cls, num_timesteps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999
    ) -> "NoiseSchedule":
        """Squared-cosine alpha-bar with clipped betas.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17.
        """
        _check_num_timesteps(num_timesteps)
        u = torch.arange(num_timesteps + 1, **_CPU) / num_timesteps
        alpha_bar = torch.cos((u + offset) / (1 + offset) * math.pi / 2) ** 2
        return cls.from_betas((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))

    @classmethod
    def rectified_flow(cls, num_timesteps: int = 1000) -> "NoiseSchedule":
        """Straight path x_t = (1 - t) x_0 + t eps at the bin midpoints t = (i + 1/2) / T: finite SNR.

        Source: Liu et al. 2022, arXiv:2209.03003, with t = 0 clean.
        """
        _check_num_timesteps(num_timesteps)
        t = (torch.arange(num_timesteps, **_CPU) + 0.5) / num_timesteps
        return cls(1 - t, t, torch.arange(num_timesteps, device="cpu"), num_timesteps)

    @classmethod
    def from_betas(cls, betas: Tensor | Sequence[float]) -> "NoiseSchedule":
        """Variance-preserving schedule with the given betas, each in (0, 1], shape (T,)."""
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
        """Variance-preserving schedule with the given alpha-bar, each in [0, 1), falling, shape (T,).

        Args:
            alphas_cumprod: alpha-bar per index.
            timesteps: original timestep of each index where the schedule is respaced, shape (T,).
            num_original: number of timesteps before respacing; required with `timesteps`.
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
        """The schedule at some of its indices only; `timesteps` goes on naming the original ones."""
        keep = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if keep.ndim != 1 or keep.numel() == 0 or keep.min() < 0 or keep.max() >= self.num_timesteps:
            raise ValueError(
                f"respaced needs indices in [0, {self.num_timesteps}), got {list(indices)[:8]}..."
            )
        return NoiseSchedule(self.alpha[keep], self.sigma[keep], self.timesteps[keep], self.num_original)

    def __repr__(self) -> str:
        return f"NoiseSchedule(T = {self.num_timesteps}, SNR {self.snr[0]:.3g} to {self.snr[-1]:.3g})"

    @property
    def num_timesteps(self) -> int:
        """T, the number of indices that can be drawn."""
        return self.alpha.numel()

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
        """d table / du with respect to the original timesteps, second-order differences, shape (T,).

        Raises:
            ValueError: T < 2, where no difference exists.
        """
        if self.num_timesteps < 2:
            raise ValueError(f"a derivative along the schedule needs T >= 2, got T = {self.num_timesteps}")
        return torch.gradient(table, spacing=(self.timesteps.to(table),))[0] * self.num_original

    @cached_property
    def acceleration_index(self) -> int:
        """First index of the deceleration area: the steepest point of 1 - alpha-bar.

        Source: Wang et al. 2024, arXiv:2405.17403.
        """
        return int(self.gradient(1 - self.alphas_cumprod).argmax())

    def convergence_index(self, snr: float = CONVERGENCE_SNR) -> int:
        """First index of the convergence area, tau in [0, T]: how many indices have at least this SNR."""
        if not snr > 0:
            raise ValueError(f"the SNR boundary needs to be > 0, got {snr}")
        # Relative slack: alpha-bar / (1 - alpha-bar) and alpha^2 / sigma^2 differ in the last digits.
        return int((self.snr >= snr * (1 - 1e-12)).sum())

    def flat_index(self, threshold: float = 0.1) -> int:
        """First index past the steepest point where d sqrt(1 - alpha-bar) / du < threshold; T if none is."""
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
