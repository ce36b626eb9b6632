"""The trainer's diffusion process: noises a batch and computes the loss of a model's prediction per sample.

Dims: B batch, C channels, T timesteps; "..." is (H, W) for images or (F, H, W) for videos.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import PROCESSES, nearest
from speedit_plugins.trainer.diffusion.gaussian import (
    PARAMETRISATIONS,
    Gaussian,
    ProcessTables,
    discretized_log_likelihood,
    gaussian_kl,
)
from speedit_plugins.trainer.diffusion.respacing import space_timesteps


@dataclass(frozen=True, eq=False)
class Noised:
    """A noised batch: x_t, target, x_0 and noise of shape (B, C, ...), float32 or wider.

    `index` is the row of the schedule, int64 (B,). `timestep` is the original timestep of that row (before
    respacing), which the model embeds, (B,).
    """

    x_t: Tensor
    target: Tensor
    x_0: Tensor
    noise: Tensor
    index: Tensor
    timestep: Tensor


@dataclass(frozen=True, eq=False)
class LossTerms:
    """Per-sample terms, each (B,): the loss to train on, the unweighted mse, and vb in bits per dimension.

    vb is 0 if the variance is not learned. `alignment` is the mean cosine similarity of a training that
    aligns features, None in any other. `bound` is the part of `loss` that trains the variance channels, of
    all passes; None is no part.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor
    alignment: Tensor | None = None
    bound: Tensor | None = None


class GaussianProcess:
    """Noises data along a noise schedule and turns predictions into losses and denoising steps.

    Args:
        schedule: T >= 2 timesteps with strictly falling SNR.
        prediction_type: what the model's mean channels predict: epsilon, x0, v or flow.
        learn_sigma: the model has C more channels for the variance. They interpolate the log-variance of a
            denoising step between the posterior's (-1) and log beta (+1), and are trained by the variational
            bound. Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equations 15 and 16.
        sigma_small: without `learn_sigma`, denoising steps have the posterior's variance instead of beta.
        rescale_learned_sigmas: multiply the bound by T / 1000; False takes it in full, as in DiT.

    Raises:
        ValueError: the prediction type is unknown, an option has no effect, or the bound would be infinite.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        prediction_type: str = "epsilon",
        learn_sigma: bool = True,
        sigma_small: bool = False,
        rescale_learned_sigmas: bool = False,
    ) -> None:
        if prediction_type not in PARAMETRISATIONS:
            raise ValueError(_unknown("prediction_type", prediction_type, PARAMETRISATIONS))
        if learn_sigma and sigma_small:
            raise ValueError("sigma_small sets the fixed variance: it needs learn_sigma=False, got True")
        if rescale_learned_sigmas and not learn_sigma:
            raise ValueError("rescale_learned_sigmas scales the bound: it needs learn_sigma=True, got False")
        if learn_sigma and prediction_type == "epsilon" and schedule.alpha[-1] == 0:
            raise ValueError(
                "epsilon with learn_sigma needs SNR > 0, got 0 at the last index, where the noise does not "
                "determine x_0 and the bound is infinite: predict v or x0"
            )
        self.schedule = schedule
        self.prediction_type = prediction_type
        self.learn_sigma = learn_sigma
        self.sigma_small = sigma_small
        self.rescale_learned_sigmas = rescale_learned_sigmas
        self._parametrisation = PARAMETRISATIONS[prediction_type]
        self._tables = {torch.device("cpu"): ProcessTables.of(schedule)}

    def corrupt(
        self,
        x_0: Tensor,
        draw: TimestepDraw,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Noised:
        """Noises x_0 to the drawn timesteps.

        Args:
            x_0: data or latents, floating point, shape (B, C, ...).
            draw: indices of shape (B,) on x_0's device.
            noise: standard normal noise in x_0's shape; None generates it.
            generator: source of generated noise.

        Raises:
            ValueError: a shape or dtype does not fit, or both `noise` and `generator` are given.
        """
        if not x_0.is_floating_point() or x_0.ndim < 2:
            raise ValueError(
                f"x_0 needs floating point, shape (B, C, ...), got {x_0.dtype} {tuple(x_0.shape)}"
            )
        if draw.index.shape != x_0.shape[:1]:
            raise ValueError(f"draw needs index shape ({len(x_0)},), got {tuple(draw.index.shape)}")
        if noise is not None and generator is not None:
            raise ValueError("generator has no effect beside noise: needs one of the two, got both")
        x_0 = _widened(x_0)
        if noise is None:
            noise = torch.randn(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        elif noise.shape != x_0.shape:
            raise ValueError(f"noise needs x_0's shape {tuple(x_0.shape)}, got {tuple(noise.shape)}")
        noise = noise.to(x_0.dtype)
        alpha, sigma = self._scales(draw.index, x_0)
        return Noised(
            x_t=alpha * x_0 + sigma * noise,
            target=self.target(x_0, noise, draw.index),
            x_0=x_0,
            noise=noise,
            index=draw.index,
            timestep=self.tables(x_0.device).timesteps[draw.index],
        )

    def loss(self, prediction: Tensor, noised: Noised, draw: TimestepDraw) -> LossTerms:
        """Per-sample loss: weight * mse + vb, or weight * (mse + vb) if the draw's scope is "loss".

        The bound trains only the variance channels; the mean is detached.

        Source: Nichol & Dhariwal 2021, arXiv:2102.09672, section 3.1.

        Args:
            prediction: (B, 2C, ...) with `learn_sigma`, mean channels first; (B, C, ...) without.
            noised: the batch that `corrupt` returned.
            draw: the policy's draw for this batch; its weight scales the loss.

        Raises:
            ValueError: the prediction has another shape.
        """
        mean, variance = self.split(prediction, noised.x_t)
        mse = _flat_mean((mean - noised.target) ** 2)  # (B,)
        if variance is None:
            vb = torch.zeros_like(mse)
        else:
            vb = self._variational_bound(mean.detach(), variance, noised)  # (B,)
        weight = draw.weight.to(mse.dtype)
        loss = weight * (mse + vb) if draw.scope == "loss" else weight * mse + vb
        return LossTerms(loss, mse, vb, bound=weight * vb if draw.scope == "loss" else vb)

    def _variational_bound(self, mean: Tensor, variance: Tensor, noised: Noised) -> Tensor:
        truth = self.posterior(noised.x_0, noised.x_t, noised.index)
        model = self._step(mean, variance, noised.x_t, noised.index)
        nats = gaussian_kl(truth, model)
        # At index 0 there is no posterior to match; the term is the likelihood of the data. On a GPU it is
        # always computed, as finding out whether index 0 was drawn would make the host wait for the device.
        last_step = (noised.index == 0).reshape(-1, *[1] * (mean.ndim - 1))
        if last_step.device.type != "cpu" or last_step.any():
            nats = torch.where(last_step, -discretized_log_likelihood(noised.x_0, model), nats)
        scale = self.schedule.num_timesteps / 1000 if self.rescale_learned_sigmas else 1.0
        return _flat_mean(nats) * (scale / math.log(2.0))  # (B,)

    def target(self, x_0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """The target of the model's mean channels, shape (B, C, ...)."""
        return self._parametrisation.target(*self._scales(index, x_0), x_0, noise)

    def predicted_x_0(self, mean: Tensor, x_t: Tensor, index: Tensor) -> Tensor:
        """x_0 that follows from the mean channels, (B, C, ...); not finite for epsilon at zero SNR."""
        return self._parametrisation.x_0(*self._scales(index, x_t), x_t, mean)

    def predicted_noise(self, mean: Tensor, x_t: Tensor, index: Tensor) -> Tensor:
        """Noise that follows from the mean channels, (B, C, ...)."""
        return self._parametrisation.noise(*self._scales(index, x_t), x_t, mean)

    def posterior(self, x_0: Tensor, x_t: Tensor, index: Tensor) -> Gaussian:
        """q(x_s | x_t, x_0) with s the next cleaner index. At index 0 the log-variance is that of index 1.

        Source: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7.
        """
        tables = self.tables(x_t.device)
        mean = _rows(tables.posterior_x_0, index, x_t) * x_0 + _rows(tables.posterior_x_t, index, x_t) * x_t
        return Gaussian(mean, _rows(tables.posterior_log_variance, index, x_t))

    def denoised(self, prediction: Tensor, x_t: Tensor, index: Tensor) -> Gaussian:
        """The model's p(x_s | x_t) with s the next cleaner index; prediction as in `loss`."""
        return self._step(*self.split(prediction, x_t), x_t, index)

    def _step(self, mean: Tensor, variance: Tensor | None, x_t: Tensor, index: Tensor) -> Gaussian:
        posterior = self.posterior(self.predicted_x_0(mean, x_t, index), x_t, index)
        tables = self.tables(x_t.device)
        if self.sigma_small:
            return posterior
        if variance is None:
            return Gaussian(posterior.mean, _rows(tables.large_log_variance, index, x_t))
        share = (variance + 1) / 2
        log_beta = _rows(tables.log_beta, index, x_t)
        return Gaussian(posterior.mean, share * log_beta + (1 - share) * posterior.log_variance)

    def split(self, prediction: Tensor, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean channels and, with `learn_sigma`, variance channels: (B, C, ...) each, float32 or wider.

        Raises:
            ValueError: the prediction's shape does not fit x_t and `learn_sigma`.
        """
        B, C = x_t.shape[:2]
        wanted = (B, 2 * C if self.learn_sigma else C, *x_t.shape[2:])
        if prediction.shape != wanted:
            got = tuple(prediction.shape)
            raise ValueError(f"prediction needs shape {wanted} at learn_sigma={self.learn_sigma}, got {got}")
        prediction = _widened(prediction)
        return prediction[:, :C], prediction[:, C:] if self.learn_sigma else None

    def compared(self, prediction: Tensor, noised: Noised) -> Tensor:
        """What the loss compares with `noised.target`: the mean channels, (B, C, ...), float32 or wider."""
        return self.split(prediction, noised.x_t)[0]

    def tables(self, device: torch.device) -> ProcessTables:
        """The coefficient tables on the given device, copied there on first use."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def _scales(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        tables = self.tables(like.device)
        return _rows(tables.alpha, index, like), _rows(tables.sigma, index, like)


def gaussian_process(
    *,
    noise_schedule: str = "linear",
    zero_terminal_snr: bool = False,
    diffusion_steps: int = 1000,
    timestep_respacing: str | Sequence[int] = "",
    prediction_type: str = "epsilon",
    learn_sigma: bool = True,
    sigma_small: bool = False,
    rescale_learned_sigmas: bool = False,
) -> GaussianProcess:
    """Builds a process from the option names in configs of guided-diffusion, DiT and SpeeDiT.

    Args:
        noise_schedule: linear, scaled_linear or cosine; squaredcos_cap_v2 is an older name of cosine.
        zero_terminal_snr: rescale the schedule, see `NoiseSchedule.zero_terminal_snr`.
        diffusion_steps: T before respacing.
        timestep_respacing: see `space_timesteps`.
        prediction_type, learn_sigma, sigma_small, rescale_learned_sigmas: see `GaussianProcess`.

    Raises:
        ValueError: an unknown name, or `zero_terminal_snr` for a model of epsilon.
    """
    if noise_schedule not in _SCHEDULES:
        raise ValueError(_unknown("noise_schedule", noise_schedule, _SCHEDULES))
    schedule = _SCHEDULES[noise_schedule](diffusion_steps)
    if zero_terminal_snr:
        if prediction_type == "epsilon":
            raise ValueError(
                "zero_terminal_snr needs prediction_type v or x0, got epsilon: noise alone does not give x_0"
            )
        schedule = schedule.zero_terminal_snr()
    if timestep_respacing:
        schedule = schedule.respaced(space_timesteps(diffusion_steps, timestep_respacing))
    return GaussianProcess(
        schedule,
        prediction_type=prediction_type,
        learn_sigma=learn_sigma,
        sigma_small=sigma_small,
        rescale_learned_sigmas=rescale_learned_sigmas,
    )


_SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "squaredcos_cap_v2": NoiseSchedule.cosine,
}


def _unknown(option: str, got: str, known: Iterable[str]) -> str:
    return f"unknown {option} {got!r}{nearest(got, known)}; known: {', '.join(sorted(known))}"


def _widened(x: Tensor) -> Tensor:
    # The loss is computed in float32 or wider, also under autocast.
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _flat_mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(1)  # (B,)


def _rows(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    # Looked up in the table's precision, then rounded once to the batch's dtype.
    return table[index].to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))  # (B, 1, ...)


PROCESSES.register_module(name="SpeeDiffusion", module=gaussian_process)
