"""Sampling: from noise to data, with the schedulers of diffusers.

A scheduler sees a shortened schedule that has only the visited timesteps, as rows 0 to N - 1. It always steps
from one row to the next, so it cannot miss a timestep. With the full schedule it can: for the timesteps
linspace(999, 0), DDIMScheduler subtracts the truncated stride 1000 // N and lands between two of them.

The model's prediction is converted to x_0 here, for all samplers, and schedulers get it as
prediction_type="sample". This solves two problems:

- Clamping and thresholding are done in one place. DDIMScheduler combines a clamped x_0 with the unclamped
  noise, and DPM-Solver cannot clamp.
- No scheduler has to guess the number of channels. DPM-Solver cuts outputs with learned variance at three.

Samplers of a Gaussian process:

- ddpm: ancestral sampling with the variance of the process;
- ddim;
- ddim_leading: ddim on the timesteps 0, T // N, 2 (T // N), ..., like the pipelines of diffusers;
- ddim_leading_1: the same timesteps plus 1, like Stable Diffusion;
- dpm_solver: DPM-Solver++ 2M.

Samplers of a rectified flow are euler and heun (second order). They step from t = 1 to t = 0 on an even grid,
shifted like the process, and get the velocity. If x_0 is clamped, they get the velocity that leads to it.

Dims: B batch, C channels, N steps; "..." is (H, W) for images or (F, H, W) for videos.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from torch import Tensor

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import nearest
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.diffusion.flow import TIMESTEP_SCALE, RectifiedFlow, shifted
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.diffusion.guidance import GuidanceSchedule, Guided, Model, check_guidance
from speedit_plugins.trainer.diffusion.respacing import space_timesteps
from speedit_plugins.trainer.diffusion.thresholding import Threshold, threshold_of


@torch.no_grad()
def sample(  # noqa: PLR0913 - one entry point; every choice is a keyword with a default
    model: Model,
    process: GaussianProcess | RectifiedFlow,
    noise: Tensor,
    *,
    condition: Condition = None,
    null_condition: Condition = None,
    sampler: str = "ddpm",
    num_steps: int = 250,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    guidance_schedule: GuidanceSchedule | None = None,
    clip_sample: bool = False,
    dynamic_percentile: float | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Denoises noise to data: returns x_0 (B, C, ...), float32 or wider, without gradients.

    Args:
        model: model(x, timestep, condition) -> prediction in the shape that the process needs. x is (B, C,
            ...); timestep is (B,), int64, or for a rectified flow 1000 t in float32.
        process: the process that the model was trained with, without respacing.
        noise: standard normal, shape (B, C, ...).
        condition: tensor or named tensors (B, ...), passed to the model unchanged.
        null_condition: unconditional counterpart with the same names and shapes; needed if `guidance_scale`
            is not 1.
        sampler: ddpm, ddim, ddim_leading, ddim_leading_1 or dpm_solver; for a rectified flow euler or heun.
        num_steps: N, the number of model calls; heun makes 2 N - 1 calls, as its last step is an Euler step.
            ddpm and ddim visit T - 1, 0 and N - 2 timesteps between them.
        guidance_scale: s >= 0 in null + s (condition - null), for the mean channels; 1 is no guidance. The
            variance channels are those of `condition`. Source: Ho & Salimans 2022, arXiv:2207.12598.
        guidance_channels: number of mean channels to guide, from the first; None guides all. DiT's released
            samples use 3.
        guidance_schedule: share of s - 1 at a time in [0, 1], see `guidance`; None keeps s.
        clip_sample: clamp x_0 to [-1, 1] at every model call.
        dynamic_percentile: of dynamic thresholding, see `thresholding.dynamic`, at every model call; None is
            none.
        eta: amount of noise in ddim, from 0 (none) to 1 (as in ddpm). Source: Song et al. 2021,
            arXiv:2010.02502, eq. 16.
        generator: source of the noise added during sampling; on noise's device or on the CPU.
        callback: called after each step with the number of finished steps, and x (B, C, ...).

    Raises:
        ValueError: the sampler is unknown or does not fit the process, a value is out of range, an option has
            no effect, or the process cannot be sampled: it is respaced, not variance-preserving, or predicts
            epsilon at zero SNR.
    """
    end = TIMESTEP_SCALE if isinstance(process, RectifiedFlow) else process.schedule.num_original
    choices = (guidance_scale, guidance_channels, guidance_schedule)
    guided = Guided(model, condition, null_condition, *choices, end)
    check_guidance(guided, noise)
    threshold = threshold_of(clip_sample=clip_sample, dynamic_percentile=dynamic_percentile)
    chain = _chain(process, sampler, num_steps, eta, generator)
    start = noise if noise.dtype == torch.float64 else noise.float()
    for done, x in enumerate(chain.steps(guided, start, threshold=threshold), start=1):
        if callback is not None:
            callback(done, x)
    return x


def _chain(
    process: GaussianProcess | RectifiedFlow,
    sampler: str,
    num_steps: int,
    eta: float,
    generator: torch.Generator | None,
) -> "_GaussianChain | _FlowChain":
    known = [*_GAUSSIAN_SAMPLERS, *_FLOW_SAMPLERS]
    if sampler not in known:
        raise ValueError(
            f"unknown sampler {sampler!r}{nearest(sampler, known)}; known: {', '.join(sorted(known))}"
        )
    own = _FLOW_SAMPLERS if isinstance(process, RectifiedFlow) else _GAUSSIAN_SAMPLERS
    if sampler not in own:
        raise ValueError(f"a {type(process).__name__} needs sampler {' or '.join(own)}, got {sampler}")
    if not sampler.startswith("ddim") and eta != 0:
        raise ValueError(f"eta has no effect on {sampler}, only on ddim: needs 0, got {eta}")
    if isinstance(process, RectifiedFlow):
        return _FLOW_SAMPLERS[sampler](process, num_steps)
    _check_process(process)
    return _GAUSSIAN_SAMPLERS[sampler](process, num_steps, eta, generator)


@dataclass(frozen=True, eq=False)
class _GaussianChain:
    """A scheduler of diffusers on the visited timesteps only, rows 0 (clean) to N - 1.

    `options` are additional arguments of the scheduler's `step`.
    """

    process: GaussianProcess
    schedule: NoiseSchedule
    scheduler: Any
    options: dict[str, Any]
    reads_variance: bool = False

    def steps(self, guided: Guided, x: Tensor, *, threshold: Threshold | None) -> Iterator[Tensor]:
        """Yields x (B, C, ...) after each of the N steps; the last one is data."""
        for row, timestep in reversed(list(enumerate(self.schedule.timesteps.tolist()))):
            # Since the process is not respaced, the model's timestep is also the index in the process.
            index = torch.full(x.shape[:1], timestep, device=x.device)  # (B,)
            mean, variance = self.process.split(guided(x, index), x)
            x_0 = self.process.predicted_x_0(mean, x, index)
            if threshold is not None:
                x_0 = threshold(x_0)
            if variance is not None and self.reads_variance:
                x_0 = torch.cat([x_0, variance], dim=1)  # (B, 2C, ...)
            x = self.scheduler.step(x_0, row, x, return_dict=False, **self.options)[0]
            yield x


def _ddpm(
    process: GaussianProcess, num_steps: int, eta: float, generator: torch.Generator | None
) -> _GaussianChain:
    fixed = "fixed_small" if process.sigma_small else "fixed_large"
    variance_type = "learned_range" if process.learn_sigma else fixed
    schedule = _end_to_end(process.schedule, num_steps)
    scheduler = _scheduler(DDPMScheduler, schedule, variance_type=variance_type, clip_sample=False)
    return _GaussianChain(
        process, schedule, scheduler, {"generator": generator}, reads_variance=process.learn_sigma
    )


def _ddim(
    process: GaussianProcess, num_steps: int, eta: float, generator: torch.Generator | None
) -> _GaussianChain:
    return _ddim_on(_end_to_end(process.schedule, num_steps), process, eta, generator)


def _ddim_leading(
    process: GaussianProcess,
    num_steps: int,
    eta: float,
    generator: torch.Generator | None,
    *,
    offset: int = 0,
) -> _GaussianChain:
    T = process.schedule.num_timesteps
    _check_num_steps(num_steps, 1, T - offset)
    nodes = [offset + T // num_steps * node for node in range(num_steps)]
    schedule = process.schedule.respaced(nodes)
    return _ddim_on(schedule, process, eta, generator)


def _ddim_on(
    schedule: NoiseSchedule, process: GaussianProcess, eta: float, generator: torch.Generator | None
) -> _GaussianChain:
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim needs eta in [0, 1], got {eta}")
    # The last step ends at clean data, alpha-bar = 1, not at the small noise of timestep 0.
    scheduler = _scheduler(DDIMScheduler, schedule, clip_sample=False, set_alpha_to_one=True)
    return _GaussianChain(process, schedule, scheduler, {"eta": eta, "generator": generator})


def _dpm_solver(
    process: GaussianProcess, num_steps: int, eta: float, generator: torch.Generator | None
) -> _GaussianChain:
    last = process.schedule.num_timesteps - 1
    _check_num_steps(num_steps, 1, last)
    # The solver goes from its last timestep straight to sigma = 0; timestep 0 is not visited.
    stride = last / num_steps
    schedule = process.schedule.respaced([round(node * stride) for node in range(1, num_steps + 1)])
    scheduler = _scheduler(
        DPMSolverMultistepScheduler,
        schedule,
        # At zero SNR, sigma / alpha is infinite and the first step NaN. diffusers takes 2^-24 there, but
        # schedules go lower: cosine ends at 2^-29. With 2^-100, (sigma / alpha)^2 still fits into float32.
        zero_alphas_cumprod=2.0**-100,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    return _GaussianChain(process, schedule, scheduler, {})


_GAUSSIAN_SAMPLERS: dict[
    str, Callable[[GaussianProcess, int, float, torch.Generator | None], _GaussianChain]
] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "ddim_leading": _ddim_leading,
    "ddim_leading_1": partial(_ddim_leading, offset=1),
    "dpm_solver": _dpm_solver,
}


def _end_to_end(schedule: NoiseSchedule, num_steps: int) -> NoiseSchedule:
    _check_num_steps(num_steps, 2, schedule.num_timesteps)
    # DiT's respacing: 250 of 1000 are 0, 4, 8 ... 995, 999.
    return schedule.respaced(space_timesteps(schedule.num_timesteps, [num_steps]))


def _scheduler(
    kind: Any, schedule: NoiseSchedule, *, zero_alphas_cumprod: float = 0.0, **options: Any
) -> Any:
    cleaner = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    scheduler = kind(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=(1 - schedule.alphas_cumprod / cleaner).tolist(),
        prediction_type="sample",
        # The only spacing with which all three schedulers visit every row.
        timestep_spacing="trailing",
        **options,
    )
    # diffusers computes the product of 1 - beta in float32. At the clean end that leaves three digits of
    # 1 - alpha-bar.
    table = schedule.alphas_cumprod
    scheduler.alphas_cumprod = table.masked_fill(table == 0, zero_alphas_cumprod)
    scheduler.set_timesteps(schedule.num_timesteps)
    return scheduler


@dataclass(frozen=True, eq=False)
class _FlowChain:
    """A flow scheduler of diffusers with the t in (0, 1] of each model call; is_step marks ends of steps."""

    process: RectifiedFlow
    scheduler: Any
    times: list[float]
    is_step: list[bool]

    def steps(self, guided: Guided, x: Tensor, *, threshold: Threshold | None) -> Iterator[Tensor]:
        """Yields x (B, C, ...) after each of the N steps; the last one is data."""
        for time, is_step in zip(self.times, self.is_step, strict=True):
            timestep = torch.full(x.shape[:1], TIMESTEP_SCALE * time, dtype=torch.float32, device=x.device)
            velocity = self.process.velocity(guided(x, timestep), x, timestep)
            if threshold is not None:
                velocity = (x - threshold(x - time * velocity)) / time
            x = self.scheduler.step(velocity, time, x, return_dict=False)[0]
            if is_step:
                yield x


def _euler(process: RectifiedFlow, num_steps: int) -> _FlowChain:
    nodes = _flow_nodes(process, num_steps, least=1)
    scheduler = _flow_scheduler(FlowMatchEulerDiscreteScheduler, num_steps, nodes)
    return _FlowChain(process, scheduler, nodes[:-1].tolist(), [True] * num_steps)


def _heun(process: RectifiedFlow, num_steps: int) -> _FlowChain:
    # A single step would be an Euler step.
    nodes = _flow_nodes(process, num_steps, least=2)
    # The model is called twice at each inner time: to correct the previous step and to begin the next one.
    twice = torch.cat([nodes[:1], nodes[1:-1].repeat_interleave(2)])  # (2 N - 1,)
    scheduler = _flow_scheduler(FlowMatchHeunDiscreteScheduler, num_steps, torch.cat([twice, nodes[-1:]]))
    return _FlowChain(process, scheduler, twice.tolist(), [False, True] * (num_steps - 1) + [True])


_FLOW_SAMPLERS: dict[str, Callable[[RectifiedFlow, int], _FlowChain]] = {"euler": _euler, "heun": _heun}


def _flow_nodes(process: RectifiedFlow, num_steps: int, *, least: int) -> Tensor:
    """N + 1 values of t from 1 to 0, in float32, the precision of the schedulers."""
    if num_steps < least:
        raise ValueError(f"num_steps needs to be >= {least}, got {num_steps}")
    even = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64, device="cpu")
    return shifted(even, process.shift).float()


def _flow_scheduler(kind: Any, num_steps: int, sigmas: Tensor) -> Any:
    scheduler = kind()
    scheduler.set_timesteps(num_steps)
    # The default grid of diffusers ends at t = 0.001 before 0, and Heun's scheduler accepts no other grid, so
    # it is replaced here. With a begin index, schedulers count calls instead of looking timesteps up.
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    return scheduler


def _check_process(process: GaussianProcess) -> None:
    schedule = process.schedule
    if schedule.num_timesteps != schedule.num_original:
        raise ValueError(
            f"sampling needs a process without respacing, got {schedule.num_timesteps} of "
            f"{schedule.num_original} timesteps: build it with timestep_respacing='' and use num_steps"
        )
    # The schedulers store only alpha-bar and assume alpha^2 + sigma^2 = 1.
    if not schedule.is_variance_preserving:
        raise ValueError("sampling needs a variance-preserving schedule, got alpha^2 + sigma^2 other than 1")
    if process.prediction_type == "epsilon" and schedule.alpha[-1] == 0:
        raise ValueError("sampling epsilon needs SNR > 0, got 0 at the last timestep: predict v or x0")


def _check_num_steps(num_steps: int, least: int, most: int) -> None:
    if not least <= num_steps <= most:
        raise ValueError(f"num_steps needs to be in [{least}, {most}], got {num_steps}")
