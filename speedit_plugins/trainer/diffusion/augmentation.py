"""Noise on the low-resolution input of a super-resolution model, by the process that the model trains.

The level of the noise is a time in [0, 1]: 0 leaves the input, 1 is noise alone. A Gaussian process has a
level for each of its T timesteps, level k / T for the noise after k of them; a rectified flow has all.

Source: conditioning augmentation, Ho et al. 2021, arXiv:2106.15282, section 4; the level that the model is
told, Saharia et al. 2022, arXiv:2205.11487, section 2.4.

Dims: B samples, C channels; "..." is (H, W) for images or (F, H, W) for videos.
"""

import math

import torch
from torch import Tensor

from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess


class NoiseAugmentation:
    """Draws levels, and noises inputs to them.

    Args:
        process: without respacing.
        largest: largest level that is drawn, in [0, 1].

    Raises:
        ValueError: the level is out of range, or the process is respaced.
    """

    def __init__(self, process: GaussianProcess | RectifiedFlow, *, largest: float) -> None:
        if not 0 <= largest <= 1:
            raise ValueError(f"augmentation needs a level in [0, 1], got {largest}")
        schedule = process.schedule
        if isinstance(process, GaussianProcess) and schedule.num_timesteps != schedule.num_original:
            raise ValueError(
                "augmentation needs a process without respacing, got"
                f" {schedule.num_timesteps} of {schedule.num_original} timesteps"
            )
        self._process, self._largest = process, largest

    def levels(self, uniform: Tensor) -> Tensor:
        """Levels, uniform from 0 to the largest, for numbers (B,) that are uniform in [0, 1)."""
        if isinstance(self._process, RectifiedFlow):
            return uniform * self._largest
        T = self._process.schedule.num_timesteps
        return (uniform * (round(self._largest * T) + 1)).floor() / T

    def nearest(self, level: float) -> float:
        """The level of this process that is nearest to `level`.

        Raises:
            ValueError: the level is out of [0, largest], where the model was not trained.
        """
        if not (math.isfinite(level) and 0 <= level <= self._largest):
            raise ValueError(f"the level of the noise needs to be in [0, {self._largest:g}], got {level}")
        if isinstance(self._process, RectifiedFlow):
            return level
        T = self._process.schedule.num_timesteps
        return round(level * T) / T

    def corrupt(self, x: Tensor, level: Tensor, noise: Tensor) -> Tensor:
        """alpha x + sigma noise, (B, C, ...), at the levels (B,). At level 0 it is x to the bit.

        Args:
            x: floating point, (B, C, ...).
            level: see `levels`.
            noise: standard normal, in x's shape.
        """
        alpha, sigma = self.scales(level)
        shape = (-1, *[1] * (x.ndim - 1))
        return alpha.to(x.dtype).view(shape) * x + sigma.to(x.dtype).view(shape) * noise

    def scales(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at the levels (B,), each (B,): 1 and 0 at level 0."""
        if isinstance(self._process, RectifiedFlow):
            return 1 - level, level
        tables = self._process.tables(level.device)
        alpha, sigma = tables.alpha, tables.sigma
        num_steps = (level * len(alpha)).round().long()
        row = (num_steps - 1).clamp(min=0)
        is_clean = num_steps == 0
        return (
            torch.where(is_clean, torch.ones_like(alpha[:1]), alpha[row]),
            torch.where(is_clean, torch.zeros_like(sigma[:1]), sigma[row]),
        )
