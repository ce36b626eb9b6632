"""Rectified flow: the straight path from data to noise, x_t = (1 - t) x_0 + t eps, in continuous time.

Training times follow a base distribution of t (a base density followed by a resolution shift). It is written
as a change of variable, t = Q(u), with u uniform in [0, 1] and Q the distribution's quantile function.

The schedule's T rows are bins of equal width in u, so a policy's density multiplies the base distribution.
The policy `uniform` gives the base distribution itself. SpeeD reduces it where the SNR, at the t that the
model sees, is below its boundary. Slopes along the schedule are taken per t, not per u, so the base
distribution changes neither the thresholds of a policy nor its weights.

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
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess, LossTerms, Noised

# The model embeds TIMESTEP_SCALE * t, as in SD3, FLUX and Open-Sora.
TIMESTEP_SCALE = 1000.0

# Times below it divide as it does where a predicted x_0 becomes a velocity. Source: JiT, Li & He 2025,
# arXiv:2511.13720, section 4.
LEAST_DIVISOR = 0.05

# 1 - 2^-24 is the largest float32 below 1. Above it, t would round to 1 and x_t would be pure noise.
_MARGIN = 2.0**-24

PREDICTIONS = ("flow", "x0")

# A schedule has integer timesteps: t in units of 2^-40, fine enough to separate the bins at both ends.
_TICKS = 2**40

Quantile = Callable[[Tensor], Tensor]


class RectifiedFlow:
    """Noises data along straight paths and computes the loss of a predicted velocity eps - x_0.

    A network may predict x_0 in place of the velocity. Its velocity is (x_t - x_0) / max(t, 0.05), in the
    loss, where the target is computed in the same way, and in sampling. The loss is still a velocity's, so a
    policy sees the prediction type "flow". Source: JiT, Li & He 2025, arXiv:2511.13720.

    Source: Liu et al. 2022, arXiv:2209.03003; base density and shift: Esser et al. 2024, arXiv:2403.03206.

    Args:
        prediction_type: what the network predicts, "flow" or "x0".
        diffusion_steps: T >= 2, number of bins of the policy's tables; t itself is continuous.
        base_density: distribution of t before the shift, "uniform" or "logit_normal".
        logit_mean: mean of logit(t) for logit_normal, finite; None is 0. Positive values give more noise.
        logit_std: standard deviation of logit(t), > 0; None is 1.
        shift: s > 0 in s t / (1 + (s - 1) t); above 1 gives more noise, 1 has no effect. Samplers shift their
            time grid in the same way.

    Raises:
        ValueError: the density is unknown, a value is out of range, an option has no effect, or the
            distribution is so wide that t rounds to 0 or 1 in several bins.
    """

    prediction_type = "flow"
    learn_sigma = False

    def __init__(
        self,
        *,
        prediction_type: str = "flow",
        diffusion_steps: int = 1000,
        base_density: str = "uniform",
        logit_mean: float | None = None,
        logit_std: float | None = None,
        shift: float = 1.0,
    ) -> None:
        if prediction_type not in PREDICTIONS:
            close, known = nearest(prediction_type, PREDICTIONS), ", ".join(PREDICTIONS)
            raise ValueError(
                f"a rectified flow has no prediction_type {prediction_type!r}{close}; known: {known}"
            )
        if diffusion_steps < 2:
            raise ValueError(f"a rectified flow needs diffusion_steps >= 2, got {diffusion_steps}")
        if not 0 < shift < math.inf:
            raise ValueError(f"shift needs a finite value > 0, got {shift}")
        if base_density not in _BASE_DENSITIES:
            close, known = nearest(base_density, _BASE_DENSITIES), ", ".join(sorted(_BASE_DENSITIES))
            raise ValueError(f"unknown base_density {base_density!r}{close}; known: {known}")
        self.shift, self.predicts_x_0 = shift, prediction_type == "x0"
        self._quantile = _BASE_DENSITIES[base_density](logit_mean, logit_std)
        middle = (torch.arange(diffusion_steps, dtype=torch.float64, device="cpu") + 0.5) / diffusion_steps
        t = self.time(middle)
        if not (t.diff() > 1 / _TICKS).all():
            raise ValueError(
                f"t needs to rise from bin to bin, got t = {t[0]:g} to {t[-1]:g} with equal values:"
                f" logit_mean {logit_mean}, logit_std {logit_std} and shift {shift} are too extreme"
            )
        self.schedule = NoiseSchedule(1 - t, t, (t * _TICKS).long(), _TICKS)
        # At the bin midpoints a flow is a Gaussian process. This reuses the checks and the loss, as they do
        # not depend on t.
        self._on_rows = GaussianProcess(self.schedule, prediction_type="flow", learn_sigma=False)

    def time(self, u: Tensor) -> Tensor:
        """t = Q(u), strictly inside (0, 1) and rising, in u's shape; float64 (float32 on Metal).

        Args:
            u: probability that a time of the base distribution is below t, in [0, 1].
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
        """Noises x_0 to t = Q(draw.time). The timestep of the result is 1000 t, float32.

        Args:
            x_0: data or latents, floating point, shape (B, C, ...).
            draw: indices and times of shape (B,) on x_0's device.
            noise: standard normal noise in x_0's shape; None generates it.
            generator: source of generated noise.

        Raises:
            ValueError: a shape or dtype does not fit, or both `noise` and `generator` are given.
        """
        noised = self._on_rows.corrupt(x_0, draw, noise=noise, generator=generator)
        if draw.time.shape != draw.index.shape:
            raise ValueError(f"draw needs time shape ({len(x_0)},), got {tuple(draw.time.shape)}")
        time = self.time(draw.time)  # (B,)
        t = time.to(noised.x_0.dtype).reshape(-1, *[1] * (x_0.ndim - 1))  # (B, 1, ...)
        x_t, timestep = (1 - t) * noised.x_0 + t * noised.noise, (TIMESTEP_SCALE * time).float()
        target = self.velocity(noised.x_0, x_t, timestep) if self.predicts_x_0 else noised.target
        return replace(noised, x_t=x_t, target=target, timestep=timestep)

    def loss(self, prediction: Tensor, noised: Noised, draw: TimestepDraw) -> LossTerms:
        """Per-sample weight * mse of the velocity; vb is 0.

        Args:
            prediction: velocity or x_0, shape (B, C, ...).
            noised: the batch that `corrupt` returned.
            draw: the policy's draw for this batch; its weight scales the loss.

        Raises:
            ValueError: the prediction has another shape.
        """
        return self._on_rows.loss(self.compared(prediction, noised), noised, draw)

    def compared(self, prediction: Tensor, noised: Noised) -> Tensor:
        """What the loss compares with `noised.target`: the velocity, (B, C, ...), float32 or wider."""
        return self.velocity(prediction, noised.x_t, noised.timestep)

    def velocity(self, prediction: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """The velocity of a prediction, in float32 or wider, (B, C, ...).

        Args:
            prediction: velocity or x_0, (B, C, ...).
            x_t: what it was predicted from, (B, C, ...).
            timestep: 1000 t, (B,).

        Raises:
            ValueError: the prediction has another shape than x_t.
        """
        prediction = self._on_rows.split(prediction, x_t)[0]
        if not self.predicts_x_0:
            return prediction
        t = (timestep.to(x_t.dtype) / TIMESTEP_SCALE).clamp(min=LEAST_DIVISOR)
        return (x_t - prediction) / t.reshape(-1, *[1] * (x_t.ndim - 1))


def shifted(t: Tensor, shift: float) -> Tensor:
    """s t / (1 + (s - 1) t): maps [0, 1] onto [0, 1] and keeps both ends.

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
