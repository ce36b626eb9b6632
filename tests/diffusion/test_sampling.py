"""Compares samplers with independent float64 implementations and the exact solution for Gaussian data."""

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.trainer.diffusion.gaussian_process import GaussianProcess
from speedit_plugins.trainer.diffusion.respacing import space_timesteps
from speedit_plugins.trainer.diffusion.sampling import sample

IMAGE, VIDEO = (2, 4, 4, 4), (2, 4, 3, 4, 4)
LINEAR = NoiseSchedule.linear()
SAMPLERS = ("ddpm", "ddim", "dpm_solver")

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def wavy(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    """A smooth function in place of a model: noise channels, then variance channels in [-1, 1]."""
    phase = (timestep / 1000 + (0 if condition is None else condition)).to(x.dtype)
    phase = phase.reshape(-1, *[1] * (x.ndim - 1))
    return torch.cat([0.9 * x + 0.2 * torch.sin(3 * x + phase), torch.sin(5 * x + phase)], dim=1)


def mean_only(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
    return wavy(x, timestep, condition)[:, : x.shape[1]]


def x_0_of(model: Model, x: Tensor, t: int, schedule: NoiseSchedule = LINEAR) -> tuple[Tensor, Tensor]:
    out = model(x, torch.full(x.shape[:1], t), None)
    mean, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
    return (x - schedule.sigma[t] * mean) / schedule.alpha[t], rest


def ancestral(
    model: Model, x: Tensor, nodes: list[int], *, variance: str, generator: torch.Generator
) -> Tensor:
    """DDPM by Bayes' rule: each step samples a product of two Gaussians. `nodes` are falling timesteps."""
    for t, s in zip(nodes, nodes[1:], strict=False):
        x_0, channels = x_0_of(model, x, t)
        scale = LINEAR.alpha[t] / LINEAR.alpha[s]
        added = LINEAR.sigma[t] ** 2 - (scale * LINEAR.sigma[s]) ** 2
        precision = 1 / LINEAR.sigma[s] ** 2 + scale**2 / added
        mean = (LINEAR.alpha[s] * x_0 / LINEAR.sigma[s] ** 2 + scale * x / added) / precision
        posterior = torch.ones_like(x) / precision
        widths = {
            "learned": lambda low, high, v: high ** ((v + 1) / 2) * low ** ((1 - v) / 2),
            "small": lambda low, high, v: low,
            "large": lambda low, high, v: high * torch.ones_like(low),
        }
        width = widths[variance](posterior, added, channels)
        x = mean + width.sqrt() * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x_0_of(model, x, nodes[-1])[0]


def implicit(
    x: Tensor,
    nodes: list[int],
    *,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    clip: float = 1e9,
) -> Tensor:
    """DDIM, equations 12 and 16 of arXiv:2010.02502, with the noise computed from the clamped x_0.

    `nodes` are falling timesteps.
    """
    for t, s in zip(nodes, [*nodes[1:], None], strict=True):
        bar = LINEAR.alphas_cumprod[t]
        bar_s = LINEAR.alphas_cumprod[s] if s is not None else torch.tensor(1.0).double()
        x_0 = x_0_of(mean_only, x, t)[0].clamp(-clip, clip)
        eps = (x - bar.sqrt() * x_0) / (1 - bar).sqrt()
        deviation = eta * ((1 - bar_s) / (1 - bar) * (1 - bar / bar_s)).sqrt()
        x = bar_s.sqrt() * x_0 + (1 - bar_s - deviation**2).sqrt() * eps
        if eta:
            x = x + deviation * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return x


def nodes_of(num_steps: int) -> list[int]:
    return space_timesteps(1000, [num_steps])[::-1]


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
@pytest.mark.parametrize("num_steps", [2, 7, 250])
def test_ddpm_with_learned_variance_equals_bayes_rule(num_steps: int, shape: tuple[int, ...]) -> None:
    noise = randn(shape, 0)
    got = sample(
        wavy, GaussianProcess(LINEAR), noise, num_steps=num_steps, generator=torch.Generator().manual_seed(1)
    )
    expected = ancestral(
        wavy, noise, nodes_of(num_steps), variance="learned", generator=torch.Generator().manual_seed(1)
    )
    # The two computations round differently, amplified by 1 / alpha = 157 at the noisy end and 250 steps.
    assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sigma_small", [False, True])
def test_ddpm_with_fixed_variance_equals_bayes_rule(sigma_small: bool) -> None:
    process = GaussianProcess(LINEAR, learn_sigma=False, sigma_small=sigma_small)
    noise = randn(IMAGE, 0)
    got = sample(mean_only, process, noise, num_steps=30, generator=torch.Generator().manual_seed(1))
    kind = "small" if sigma_small else "large"
    generator = torch.Generator().manual_seed(1)
    expected = ancestral(mean_only, noise, nodes_of(30), variance=kind, generator=generator)
    assert_close(got, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("num_steps", [2, 50, 250])
def test_ddim_equals_its_closed_form(num_steps: int, eta: float) -> None:
    noise = randn(IMAGE, 0)
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    process = GaussianProcess(LINEAR)  # ddim ignores the variance channels
    got = sample(wavy, process, noise, sampler="ddim", num_steps=num_steps, eta=eta, generator=first)
    expected = implicit(noise, nodes_of(num_steps), eta=eta, generator=second)
    assert_close(got, expected, rtol=1e-7, atol=1e-7)


def test_ddim_computes_the_noise_from_the_clamped_x_0() -> None:
    noise = randn(IMAGE, 0)
    process = GaussianProcess(LINEAR, learn_sigma=False)
    got = sample(mean_only, process, noise, sampler="ddim", num_steps=20, clip_sample=True)
    expected = implicit(noise, nodes_of(20), clip=1.0)
    assert (implicit(noise, nodes_of(20)) - expected).abs().max() > 0.1  # the clamp matters
    assert_close(got, expected, rtol=1e-7, atol=1e-7)


# diffusers stores sigma / alpha and x in float32, 6e-8 each. The 12 steps start at sigma / alpha = 157. The
# cosine schedule ends at alpha-bar = 2.4e-9. There a floor of 2^-24 = 6e-8 would change the result by 1e-3.
@pytest.mark.parametrize(
    ("schedule", "num_steps", "tolerance"), [(LINEAR, 12, 1e-4), (NoiseSchedule.cosine(), 5, 5e-6)]
)
def test_dpm_solver_equals_the_two_step_formula_of_its_paper(
    schedule: NoiseSchedule, num_steps: int, tolerance: float
) -> None:
    """DPM-Solver++ 2M, algorithm 2 of arXiv:2211.01095, with first-order first and last steps."""
    nodes = space_timesteps(1000, [num_steps + 1])[:0:-1]
    noise = randn(IMAGE, 0)
    x, before, width_before = noise, None, None
    lam = 0.5 * schedule.log_snr
    for t, s in zip(nodes, nodes[1:], strict=False):
        x_0 = mean_only(x, torch.tensor([t, t]), None)
        width = lam[s] - lam[t]
        data = x_0
        if before is not None:
            ratio = width_before / width
            data = (1 + 1 / (2 * ratio)) * x_0 - before / (2 * ratio)
        x = schedule.sigma[s] / schedule.sigma[t] * x - schedule.alpha[s] * torch.expm1(-width) * data
        before, width_before = x_0, width
    expected = mean_only(x, torch.tensor([s, s]), None)
    process = GaussianProcess(schedule, prediction_type="x0", learn_sigma=False)
    got = sample(mean_only, process, noise, sampler="dpm_solver", num_steps=num_steps)
    assert_close(got, expected, rtol=tolerance, atol=tolerance)


def gaussian_flow(num_steps: int, sampler: str, prediction_type: str, schedule: NoiseSchedule) -> float:
    """Largest difference between a sample and the solution of the probability-flow ODE for data N(mu, s^2).

    Along the flow z = (x - alpha mu) / sqrt(alpha^2 s^2 + sigma^2) is constant. The last step returns the
    exact x_0 prediction at the last timestep: mu + alpha s^2 z / sqrt(alpha^2 s^2 + sigma^2).
    """
    mu, std = 0.3, 0.5
    process = GaussianProcess(schedule, prediction_type=prediction_type, learn_sigma=False)
    seen: list[int] = []

    def exact(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        alpha, sigma = (table[timestep].reshape(-1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
        spread = alpha**2 * std**2 + sigma**2
        x_0 = mu + alpha * std**2 * (x - alpha * mu) / spread
        seen.append(int(timestep[0]))
        return process.target(x_0, sigma * (x - alpha * mu) / spread, timestep)

    noise = randn(IMAGE, 0)
    got = sample(exact, process, noise, sampler=sampler, num_steps=num_steps)
    alpha, sigma = schedule.alpha[seen], schedule.sigma[seen]
    width = (alpha**2 * std**2 + sigma**2).sqrt()
    z = (noise - alpha[0] * mu) / width[0]
    return float((got - (mu + alpha[-1] * std**2 * z / width[-1])).abs().max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_ode_samplers_converge_to_the_gaussian_flow(prediction_type: str) -> None:
    check_convergence(prediction_type, LINEAR)


def check_convergence(prediction_type: str, schedule: NoiseSchedule) -> None:
    implicit_error = {n: gaussian_flow(n, "ddim", prediction_type, schedule) for n in (40, 160)}
    # DDIM is of first order: a quarter of the step size leaves a quarter of the error, up to higher orders.
    assert implicit_error[40] / implicit_error[160] == pytest.approx(4, rel=0.1)
    # The second-order solver has a much smaller error: after 160 steps, under 1 % of the data's std of 0.5.
    solver_error = gaussian_flow(160, "dpm_solver", prediction_type, schedule)
    assert solver_error < implicit_error[160] / 4
    assert solver_error < 0.005


@pytest.mark.parametrize("prediction_type", ["x0", "v"])
def test_zero_terminal_snr_samples_follow_the_gaussian_flow(prediction_type: str) -> None:
    schedule = NoiseSchedule.scaled_linear().zero_terminal_snr()
    check_convergence(prediction_type, schedule)
    # The last alpha-bar above 0 is 4e-9 here. A floor of 2^-24 = 6e-8 would make the last four equal, and the
    # steps between them NaN. DDIM has an error of 4.5e-3.
    dense = NoiseSchedule.linear().zero_terminal_snr()
    assert gaussian_flow(999, "dpm_solver", prediction_type, dense) < 4.5e-4
    process = GaussianProcess(schedule, prediction_type=prediction_type)
    assert torch.isfinite(sample(wavy, process, randn(IMAGE, 0), num_steps=10)).all()


def visited(sampler: str, num_steps: int) -> list[int]:
    seen: list[int] = []

    def model(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        assert (timestep.shape, timestep.dtype, condition) == ((2,), torch.int64, None)
        assert (timestep == timestep[0]).all()
        seen.append(int(timestep[0]))
        return x

    process = GaussianProcess(LINEAR, learn_sigma=False)
    sample(model, process, randn(IMAGE, 0), sampler=sampler, num_steps=num_steps)
    return seen


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler), ("dpm_solver", DPMSolverMultistepScheduler)],
)
def test_samplers_visit_the_linspace_timesteps_of_diffusers(sampler: str, scheduler: type) -> None:
    own = scheduler(num_train_timesteps=1000, timestep_spacing="linspace")
    for num_steps in (2, 15, 20, 50, 250):
        own.set_timesteps(num_steps)
        assert visited(sampler, num_steps) == own.timesteps.tolist()


@pytest.mark.parametrize(("sampler", "offset"), [("ddim_leading", 0), ("ddim_leading_1", 1)])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_ddim_leading_equals_the_scheduler_of_diffusers_pipelines(
    sampler: str, offset: int, num_steps: int
) -> None:
    process = GaussianProcess(LINEAR, learn_sigma=False)
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="leading", steps_offset=offset
    )
    scheduler.set_timesteps(num_steps)
    x = noise = randn(IMAGE, 0)
    for timestep in scheduler.timesteps:
        x = scheduler.step(mean_only(x, timestep.expand(len(x)), None), timestep, x).prev_sample
    # diffusers stores alpha-bar in float32, seven digits; the steps amplify the error.
    found = sample(mean_only, process, noise, sampler=sampler, num_steps=num_steps)
    assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_ddpm_at_250_goes_from_999_to_0() -> None:
    steps = visited("ddpm", 250)
    assert steps == np.linspace(0, 999, 250).round()[::-1].astype(int).tolist()
    assert (steps[0], steps[-1], len(steps)) == (999, 0, 250)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("channels", [None, 3, 1])
def test_guidance_mixes_only_the_mean_channels(channels: int | None, dtype: torch.dtype) -> None:
    noise, condition, null = randn(IMAGE, 0), torch.tensor([0.3, 0.9]), torch.tensor([2.0, 2.0])
    batches: list[tuple[int, list[float]]] = []

    def recorded(x: Tensor, timestep: Tensor, given: Tensor | None) -> Tensor:
        batches.append((len(x), given.tolist()))
        return wavy(x, timestep, given).to(dtype)

    def by_hand(x: Tensor, timestep: Tensor, given: Tensor | None) -> Tensor:
        wanted, unwanted = (wavy(x, timestep, y).to(dtype).double() for y in (condition, null))
        out = wanted.clone()
        kept = 4 if channels is None else channels
        out[:, :kept] = unwanted[:, :kept] + 1.5 * (wanted[:, :kept] - unwanted[:, :kept])
        return out

    process = GaussianProcess(LINEAR)
    guidance = {"condition": condition, "null_condition": null, "guidance_channels": channels}
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    got = sample(recorded, process, noise, num_steps=5, guidance_scale=1.5, generator=first, **guidance)
    expected = sample(by_hand, process, noise, num_steps=5, generator=second)
    assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert batches == [(4, [*condition.tolist(), *null.tolist()])] * 5


def test_guidance_scale_runs_from_null_to_condition() -> None:
    noise, condition, null = randn(IMAGE, 0), torch.tensor([0.3, 0.9]), torch.tensor([2.0, 2.0])
    process = GaussianProcess(LINEAR, learn_sigma=False)

    def run(given: Tensor, **options: object) -> Tensor:
        return sample(mean_only, process, noise, condition=given, sampler="ddim", num_steps=5, **options)

    assert_close(run(condition, null_condition=null, guidance_scale=0.0), run(null), rtol=1e-9, atol=1e-9)
    assert_close(run(condition, null_condition=null), run(condition), rtol=0, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_only_clip_sample_clamps(sampler: str) -> None:
    process = GaussianProcess(LINEAR, prediction_type="x0", learn_sigma=False)

    def far(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return torch.full_like(x, 5.0)

    for clip, value in ((False, 5.0), (True, 1.0)):
        got = sample(far, process, randn(IMAGE, 0).float(), sampler=sampler, num_steps=5, clip_sample=clip)
        # Every sampler ends at the predicted x_0, up to float32 rounding.
        assert_close(got, torch.full(IMAGE, value), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_callback_gets_every_step_and_the_result(sampler: str) -> None:
    steps: list[tuple[int, Tensor]] = []
    options = {"sampler": sampler, "num_steps": 4, "callback": lambda n, x: steps.append((n, x))}
    got = sample(wavy, GaussianProcess(LINEAR), randn(IMAGE, 0), **options)
    assert [number for number, _ in steps] == [1, 2, 3, 4]
    assert steps[-1][1] is got
    assert all(x.shape == IMAGE for _, x in steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_half_precision_is_sampled_in_float32_without_gradients(sampler: str) -> None:
    weight = torch.ones(1, requires_grad=True)

    def half(x: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        assert x.dtype == torch.float32
        return (weight * wavy(x, timestep, condition)).bfloat16()

    got = sample(half, GaussianProcess(LINEAR), randn(IMAGE, 0).bfloat16(), sampler=sampler, num_steps=3)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert torch.isfinite(got).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sampler": "ddpn"},
            "unknown sampler 'ddpn'; did you mean 'ddpm'.*known: ddim, ddim_leading, .*ddpm, dpm_solver",
        ),
        ({"eta": 0.5}, "eta has no effect on ddpm, only on ddim: needs 0, got 0.5"),
        ({"eta": 0.5, "sampler": "dpm_solver"}, "eta has no effect on dpm_solver"),
        ({"eta": 1.5, "sampler": "ddim"}, r"ddim needs eta in \[0, 1\], got 1.5"),
        ({"num_steps": 1}, r"num_steps needs to be in \[2, 1000\], got 1"),
        ({"num_steps": 1001, "sampler": "ddim"}, r"num_steps needs to be in \[2, 1000\]"),
        ({"num_steps": 1000, "sampler": "dpm_solver"}, r"num_steps needs to be in \[1, 999\]"),
        ({"guidance_scale": 2.0}, "null_condition of the same names and shapes, got None and None"),
        ({"guidance_scale": -1.0}, "guidance_scale needs a finite value >= 0, got -1.0"),
        ({"guidance_channels": 3}, "guidance_channels has no effect at guidance_scale 1: needs None, got 3"),
        (
            {"guidance_scale": 2.0, "guidance_channels": 5},
            r"guidance_channels needs to be in \[1, 4\], got 5",
        ),
        (
            {"guidance_scale": 2.0, "condition": torch.zeros(2), "null_condition": torch.zeros(1)},
            r"of the same names and shapes, got \(2,\) and \(1,\)",
        ),
    ],
)
def test_options_without_effect_or_out_of_range_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(wavy, GaussianProcess(LINEAR), randn(IMAGE, 0), **options)


def test_processes_that_cannot_be_sampled_raise() -> None:
    noise = randn(IMAGE, 0)
    respaced = GaussianProcess(LINEAR.respaced(space_timesteps(1000, "250")))
    with pytest.raises(ValueError, match="got 250 of 1000 timesteps: build it with .* and use num_steps"):
        sample(wavy, respaced, noise)
    flow = GaussianProcess(NoiseSchedule.rectified_flow(), prediction_type="flow")
    with pytest.raises(ValueError, match="needs a variance-preserving schedule"):
        sample(wavy, flow, noise)
    dark = GaussianProcess(NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.0]), learn_sigma=False)
    with pytest.raises(ValueError, match="sampling epsilon needs SNR > 0, got 0 at the last timestep"):
        sample(wavy, dark, noise, num_steps=2)
    with pytest.raises(ValueError, match=r"prediction needs shape \(2, 8, 4, 4\) at learn_sigma=True"):
        sample(mean_only, GaussianProcess(LINEAR), noise)


def test_sampling_does_not_import_the_policy() -> None:
    origin = importlib.util.find_spec("speedit_plugins.trainer.diffusion.sampling").origin
    tree = ast.walk(ast.parse(Path(origin).read_text()))
    imported = [node.module for node in tree if isinstance(node, ast.ImportFrom)]
    assert "speedit_plugins.trainer.diffusion.gaussian_process" in imported
    assert not [name for name in imported if "policy" in name or name == "speedit_plugins"]
