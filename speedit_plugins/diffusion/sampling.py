"""From noise to data, through diffusers' schedulers.

A sampler runs on a chain of its own: the schedule at the visited timesteps only, as rows 0 to N - 1. Each
scheduler then steps from one row to the next, and no arithmetic on timesteps can miss a node: on the linspace
999 ... 0, DDIMScheduler by itself subtracts the truncated stride 1000 // N and lands between two nodes.

The model's prediction becomes x_0 here, for all samplers alike, and the schedulers get it as "sample": that
makes one place for clamping (DDIMScheduler keeps the unclamped noise beside a clamped x_0, DPM-Solver has no
clamp) and leaves no channel count to guess (DPM-Solver cuts learned-variance outputs at three channels).

Dims: B batch, C channels, N steps; "..." is (H, W) for images or (F, H, W) for videos.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from speedit_plugins.core.schedule import NoiseSchedule
from speedit_plugins.diffusion.process import GaussianProcess
from speedit_plugins.diffusion.respacing import space_timesteps
from speedit_plugins.registry import nearest

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@torch.no_grad()
def sample(  # noqa: PLR0913 - one entry point; every choice is a keyword with a default
    model: Model,
    process: GaussianProcess,
    noise: Tensor,
    *,
    condition: Tensor | None = None,
    null_condition: Tensor | None = None,
    sampler: str = "ddpm",
    num_steps: int = 250,
    guidance_scale: float = 1.0,
    guidance_channels: int | None = None,
    clip_sample: bool = False,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
) -> Tensor:
    """Denoises to data: x_0 of shape (B, C, ...), float32 or wider, without gradients.

    Args:
        model: model(x (B, C, ...), timestep (B,) int64, condition) -> prediction as the process asks for it.
        process: what the model was trained on, its schedule not respaced.
        noise: standard normal, shape (B, C, ...).
        condition: (B, ...), given to the model as it is.
        null_condition: of the same shape; read where `guidance_scale` is not 1.
        sampler: ddpm (ancestral; variance as the process has it), ddim, or dpm_solver (DPM-Solver++ 2M).
        num_steps: calls of the model, N; ddpm and ddim visit T - 1, 0 and N - 2 between.
        guidance_scale: s >= 0 in null + s (condition - null), on the mean channels; 1 is no guidance. The
            variance channels are those of `condition`. Source: Ho & Salimans 2022, arXiv:2207.12598.
        guidance_channels: guide the first few mean channels alone; 3 is what DiT's released samples use.
        clip_sample: clamp x_0 to [-1, 1] at every step.
        eta: noise of ddim, 0 (none) to 1 (as ancestral). Source: Song et al. 2021, arXiv:2010.02502, eq. 16.
        generator: source of the noise added on the way; of noise's device, or of the CPU.
        callback: told the number of steps done, 1 to N, and x (B, C, ...) after each.

    Raises:
        ValueError: an unknown sampler, a value out of range, an option without effect, or a process that
            cannot be sampled: respaced, not variance-preserving, or epsilon at zero SNR.
    """
    _check_process(process)
    _check_guidance(guidance_scale, guidance_channels, noise, condition, null_condition)
    if sampler not in _SAMPLERS:
        known = ", ".join(sorted(_SAMPLERS))
        raise ValueError(f"unknown sampler {sampler!r}{nearest(sampler, _SAMPLERS)}; known: {known}")
    chain = _SAMPLERS[sampler](process, num_steps, eta, generator)
    guided = _Guided(model, condition, null_condition, guidance_scale, guidance_channels)
    x = noise if noise.dtype == torch.float64 else noise.float()
    visits = reversed(list(enumerate(chain.schedule.timesteps.tolist())))
    for done, (row, timestep) in enumerate(visits, start=1):
        # The process is not respaced: the timestep that the model embeds is also the process' index.
        index = torch.full(x.shape[:1], timestep, device=x.device)  # (B,)
        mean, variance = process.split(guided(x, index), x)
        x_0 = process.predicted_x_0(mean, x, index)
        if clip_sample:
            x_0 = x_0.clamp(-1, 1)
        if variance is not None and chain.reads_variance:
            x_0 = torch.cat([x_0, variance], dim=1)  # (B, 2C, ...)
        x = chain.step(x_0, row, x)
        if callback is not None:
            callback(done, x)
    return x


@dataclass(frozen=True)
class _Guided:
    """The model under classifier-free guidance: x and timestep -> prediction, in the dtype of x."""

    model: Model
    condition: Tensor | None
    null_condition: Tensor | None
    scale: float
    channels: int | None

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        if self.scale == 1 or self.condition is None or self.null_condition is None:
            return self.model(x, timestep, self.condition).to(x.dtype)
        both = torch.cat([self.condition, self.null_condition])  # (2B, ...)
        prediction = self.model(torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        # Widened first: the scale multiplies the rounding of a half-precision difference.
        given, null = prediction.to(x.dtype).chunk(2)
        guided = null + self.scale * (given - null)
        channels = x.shape[1] if self.channels is None else self.channels
        return torch.cat([guided[:, :channels], given[:, channels:]], dim=1)


@dataclass(frozen=True, eq=False)
class _Chain:
    """A diffusers scheduler on the visited timesteps alone, rows 0 (clean) to N - 1.

    options are what its `step` takes beside the prediction, the row and x.
    """

    schedule: NoiseSchedule
    scheduler: Any
    options: dict[str, Any]
    reads_variance: bool = False

    def step(self, x_0: Tensor, row: int, x: Tensor) -> Tensor:
        """X one row cleaner, data after row 0, (B, C, ...); x_0 is (B, 2C, ...) if the variance is read."""
        cleaner: Tensor = self.scheduler.step(x_0, row, x, return_dict=False, **self.options)[0]
        return cleaner


def _ddpm(process: GaussianProcess, num_steps: int, eta: float, generator: torch.Generator | None) -> _Chain:
    _check_no_eta("ddpm", eta)
    fixed = "fixed_small" if process.sigma_small else "fixed_large"
    variance_type = "learned_range" if process.learn_sigma else fixed
    schedule = _end_to_end(process.schedule, num_steps)
    scheduler = _scheduler(DDPMScheduler, schedule, variance_type=variance_type, clip_sample=False)
    return _Chain(schedule, scheduler, {"generator": generator}, reads_variance=process.learn_sigma)


def _ddim(process: GaussianProcess, num_steps: int, eta: float, generator: torch.Generator | None) -> _Chain:
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim needs eta in [0, 1], got {eta}")
    schedule = _end_to_end(process.schedule, num_steps)
    # The chain ends on clean data, alpha-bar = 1, and not on the noise that timestep 0 still has.
    scheduler = _scheduler(DDIMScheduler, schedule, clip_sample=False, set_alpha_to_one=True)
    return _Chain(schedule, scheduler, {"eta": eta, "generator": generator})


def _dpm_solver(
    process: GaussianProcess, num_steps: int, eta: float, generator: torch.Generator | None
) -> _Chain:
    _check_no_eta("dpm_solver", eta)
    last = process.schedule.num_timesteps - 1
    _check_num_steps(num_steps, 1, last)
    # The solver goes from its last node straight to sigma = 0, which takes the place of timestep 0.
    stride = last / num_steps
    schedule = process.schedule.respaced([round(node * stride) for node in range(1, num_steps + 1)])
    scheduler = _scheduler(
        DPMSolverMultistepScheduler,
        schedule,
        # At zero SNR its sigma / alpha is infinite and the first step NaN; this floor is diffusers' own.
        least_alphas_cumprod=2.0**-24,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    return _Chain(schedule, scheduler, {})


_SAMPLERS: dict[str, Callable[[GaussianProcess, int, float, torch.Generator | None], _Chain]] = {
    "ddpm": _ddpm,
    "ddim": _ddim,
    "dpm_solver": _dpm_solver,
}


def _end_to_end(schedule: NoiseSchedule, num_steps: int) -> NoiseSchedule:
    _check_num_steps(num_steps, 2, schedule.num_timesteps)
    # DiT's own respacing: 250 of 1000 are 0, 4, 8 ... 995, 999.
    return schedule.respaced(space_timesteps(schedule.num_timesteps, [num_steps]))


def _scheduler(
    kind: Any, schedule: NoiseSchedule, *, least_alphas_cumprod: float = 0.0, **options: Any
) -> Any:
    cleaner = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod[:-1]])
    scheduler = kind(
        num_train_timesteps=schedule.num_timesteps,
        trained_betas=(1 - schedule.alphas_cumprod / cleaner).tolist(),
        prediction_type="sample",
        # The one spacing that visits every row in all three schedulers.
        timestep_spacing="trailing",
        **options,
    )
    # diffusers multiplies 1 - beta up in float32, which leaves 1 - alpha-bar three digits at the clean end.
    scheduler.alphas_cumprod = schedule.alphas_cumprod.clamp(min=least_alphas_cumprod)
    scheduler.set_timesteps(schedule.num_timesteps)
    return scheduler


def _check_process(process: GaussianProcess) -> None:
    schedule = process.schedule
    if schedule.num_timesteps != schedule.num_original:
        raise ValueError(
            f"sampling needs a process without respacing, got {schedule.num_timesteps} of "
            f"{schedule.num_original} timesteps: build it with timestep_respacing='' and use num_steps"
        )
    # The schedulers know alpha-bar alone: alpha^2 + sigma^2 = 1 is built into them.
    if not torch.allclose(schedule.alpha**2 + schedule.sigma**2, torch.ones_like(schedule.alpha)):
        raise ValueError("sampling needs a variance-preserving schedule, got alpha^2 + sigma^2 other than 1")
    if process.prediction_type == "epsilon" and schedule.alpha[-1] == 0:
        raise ValueError("sampling epsilon needs SNR > 0, got 0 at the last timestep: predict v or x0")


def _check_guidance(
    scale: float, channels: int | None, noise: Tensor, condition: Tensor | None, null: Tensor | None
) -> None:
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale needs a finite value >= 0, got {scale}")
    if scale == 1 and channels is not None:
        raise ValueError(f"guidance_channels has no effect at guidance_scale 1: needs None, got {channels}")
    if channels is not None and not 1 <= channels <= noise.shape[1]:
        raise ValueError(f"guidance_channels needs to be in [1, {noise.shape[1]}], got {channels}")
    if scale != 1 and (condition is None or null is None or condition.shape != null.shape):
        got = " and ".join("None" if x is None else str(tuple(x.shape)) for x in (condition, null))
        raise ValueError(f"guidance_scale {scale} needs condition and null_condition of one shape, got {got}")


def _check_num_steps(num_steps: int, least: int, most: int) -> None:
    if not least <= num_steps <= most:
        raise ValueError(f"num_steps needs to be in [{least}, {most}], got {num_steps}")


def _check_no_eta(sampler: str, eta: float) -> None:
    if eta != 0:
        raise ValueError(f"eta has no effect on {sampler}, only on ddim: needs 0, got {eta}")
