"""Rectified flow: the straight path from data to noise, x_t = (1 - t) x_0 + t eps, in continuous time.

The law that t is trained under, a base density followed by a resolution shift, is a change of variable:
t = Q(u), Q the law's quantile function, u uniform in [0, 1]. The schedule's T rows are bins of equal width in
u, so a policy's table multiplies the base law: `uniform` is that law itself, and SpeeD thins what has an SNR
below its boundary, measured at the t the model sees. Slopes along the schedule are per t, not per u: the base
law moves neither a policy's thresholds nor its weights.

Dims: B batch, C channels, T bins; "..." is (H, W) for images or (F, H, W) for videos.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import PROCESSES, nearest
from speedit_plugins.trainer.diffusion.process import GaussianProcess, LossTerms, Noised

# What the model embeds is this times t, as in SD3, FLUX and Open-Sora.
TIMESTEP_SCALE = 1000.0

# 1 - 2^-24 is float32's last number below 1: past it no data would be left in x_t.
_MARGIN = 2.0**-24

# t as an integer, which is how a schedule names its timesteps: fine enough to tell bins at both ends apart.
_TICKS = 2**40

Quantile = Callable[[Tensor], Tensor]


class RectifiedFlow:
    """Corrupts data along straight paths and scores the velocity eps - x_0 that a model predicts.

    Source: Liu et al. 2022, arXiv:2209.03003; base density and shift: Esser et al. 2024, arXiv:2403.03206.

    Args:
        diffusion_steps: T >= 2, bins of the policy's tables; t itself is continuous.
        base_density: law of t before the shift: uniform, or logit_normal.
        logit_mean: mean of logit(t) under logit_normal, finite, 0 if None; positive is noisier.
        logit_std: its standard deviation, > 0, 1 if None.
        shift: s > 0 in s t / (1 + (s - 1) t), above 1 noisier, 1 none; samplers shift their grid alike.

    Raises:
        ValueError: an unknown density, a value out of range, an option without effect, or a law so wide that
            t rounds to 0 or 1 in several bins.
    """

    prediction_type = "flow"
    learn_sigma = False

    def __init__(
        self,
        *,
        diffusion_steps: int = 1000,
        base_density: str = "uniform",
        logit_mean: float | None = None,
        logit_std: float | None = None,
        shift: float = 1.0,
    ) -> None:
        if diffusion_steps < 2:
            raise ValueError(f"a rectified flow needs diffusion_steps >= 2, got {diffusion_steps}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift needs a finite value > 0, got {shift}")
        if base_density not in _BASE_DENSITIES:
            close, known = nearest(base_density, _BASE_DENSITIES), ", ".join(sorted(_BASE_DENSITIES))
            raise ValueError(f"unknown base_density {base_density!r}{close}; known: {known}")
        self.shift = shift
        self._quantile = _BASE_DENSITIES[base_density](logit_mean, logit_std)
        middle = (torch.arange(diffusion_steps, dtype=torch.float64, device="cpu") + 0.5) / diffusion_steps
        t = self.time(middle)
        if not (t.diff() > 1 / _TICKS).all():
            raise ValueError(
                f"t needs to rise from bin to bin, got t = {t[0]:g} to {t[-1]:g} with several alike:"
                f" logit_mean {logit_mean}, logit_std {logit_std} and shift {shift} reach too far"
            )
        self.schedule = NoiseSchedule(1 - t, t, (t * _TICKS).long(), _TICKS)
        # On given rows a flow is a Gaussian process; what does not depend on t, its checks and its loss, is
        # taken from there.
        self._on_rows = GaussianProcess(self.schedule, prediction_type="flow", learn_sigma=False)

    def time(self, u: Tensor) -> Tensor:
        """t = Q(u), strictly inside (0, 1) and rising, of u's shape, float64 (float32 on a device without).

        Args:
            u: share of the law's mass that lies below t, in [0, 1].
        """
        # Metal has no float64.
        t = self._quantile(u.to(torch.float32 if u.device.type == "mps" else torch.float64))
        return shifted(t, self.shift).clamp(_MARGIN, 1 - _MARGIN)

    def corrupt(
        self,
        x_0: Tensor,
        draw: TimestepDraw,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Noised:
        """Noises x_0 to t = Q(draw.time); the result's timestep is 1000 t, float32.

        Args:
            x_0: data or latents, floating point, shape (B, C, ...).
            draw: indices and times of shape (B,) on x_0's device.
            noise: standard normal of x_0's shape; drawn from `generator` if absent.

        Raises:
            ValueError: a shape or dtype does not fit, or both `noise` and `generator` are given.
        """
        noised = self._on_rows.corrupt(x_0, draw, noise=noise, generator=generator)
        if draw.time.shape != draw.index.shape:
            raise ValueError(f"draw needs time shape ({len(x_0)},), got {tuple(draw.time.shape)}")
        time = self.time(draw.time)  # (B,)
        t = time.to(noised.x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))  # (B, 1, ...)
        return replace(
            noised,
            x_t=(1 - t) * noised.x_0 + t * noised.noise,
            timestep=(TIMESTEP_SCALE * time).float(),
        )

    def loss(self, prediction: Tensor, noised: Noised, draw: TimestepDraw) -> LossTerms:
        """Per-sample weight * mse of the velocity, and vb 0.

        Args:
            prediction: velocity, shape (B, C, ...).

        Raises:
            ValueError: a prediction of another shape.
        """
        return self._on_rows.loss(prediction, noised, draw)

    def velocity(self, prediction: Tensor, x_t: Tensor) -> Tensor:
        """The prediction in float32 or wider, (B, C, ...); a ValueError where its shape is not x_t's."""
        return self._on_rows.split(prediction, x_t)[0]


def shifted(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t), from [0, 1] onto [0, 1]; both ends stay.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    return shift * t / (1 + (shift - 1) * t)


def _uniform(mean: float | None, std: float | None) -> Quantile:
    if mean is not None or std is not None:
        raise ValueError(
            "logit_mean and logit_std have no effect on base_density 'uniform', only on 'logit_normal': need"
            f" None, got {mean} and {std}"
        )
    return lambda u: u


def _logit_normal(mean: float | None, std: float | None) -> Quantile:
    mean, std = 0.0 if mean is None else mean, 1.0 if std is None else std
    if not (math.isfinite(mean) and 0 < std < math.inf):
        raise ValueError(
            f"logit_normal needs a finite logit_mean and a finite logit_std > 0, got {mean} and {std}"
        )
    return lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u))


_BASE_DENSITIES: dict[str, Callable[[float | None, float | None], Quantile]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
}

PROCESSES.register_module(name="RectifiedFlow", module=RectifiedFlow)
