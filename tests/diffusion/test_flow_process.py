"""Compares the rectified flow with closed forms: distribution of t, path and loss; checks its errors."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import kstest, norm
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import PROCESSES, build
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow, shifted

IMAGE, VIDEO = (5, 4, 4, 4), (5, 4, 3, 4, 4)
# SpeeD's boundary, SNR 1/143, is at t = sqrt(143) / (1 + sqrt(143)).
BOUNDARY = math.sqrt(143) / (1 + math.sqrt(143))


Array = np.ndarray


def logit(t: Array) -> Array:
    return np.log(t / (1 - t))


def unshifted(t: Array, shift: float) -> Array:
    return t / (shift - (shift - 1) * t)


# Options of a flow, and the closed form of P(time <= t) for its base distribution.
LAWS: dict[str, tuple[dict[str, object], Callable[[Array], Array]]] = {
    "uniform": ({}, lambda t: t),
    "uniform, shift 3": ({"shift": 3.0}, lambda t: unshifted(t, 3.0)),
    "logit-normal": ({"base_density": "logit_normal"}, lambda t: norm.cdf(logit(t))),
    "logit-normal(-0.5, 0.7), shift 2": (
        {"base_density": "logit_normal", "logit_mean": -0.5, "logit_std": 0.7, "shift": 2.0},
        lambda t: norm.cdf((logit(unshifted(t, 2.0)) + 0.5) / 0.7),
    ),
}


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(u: list[float], *, T: int = 1000, weight: float = 1.0, scope: str = "mse") -> TimestepDraw:
    time = torch.tensor(u, dtype=torch.float64)
    index = (time * T).long().clamp(max=T - 1)
    return TimestepDraw(index, time.float(), torch.full((len(u),), weight), scope)


def drawn_times(flow: RectifiedFlow, policy: str, count: int) -> Tensor:
    draw = build_policy(policy, flow.schedule, "flow").draw(count, generator=torch.Generator().manual_seed(0))
    x_0 = torch.zeros(count, 1)
    return flow.corrupt(x_0, draw, generator=torch.Generator().manual_seed(1)).timestep / 1000


@pytest.mark.parametrize("name", LAWS)
def test_uniform_draws_follow_the_shifted_base_distribution(name: str) -> None:
    options, law = LAWS[name]
    times = drawn_times(RectifiedFlow(**options), "uniform", 20_000)
    distance = kstest(times.double().numpy(), law).statistic
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 for one seed in a thousand.
    assert distance < 1.95 / math.sqrt(20_000)


@pytest.mark.parametrize("name", LAWS)
def test_speed_divides_the_base_distribution_by_k_beyond_the_boundary(name: str) -> None:
    options, law = LAWS[name]
    times = drawn_times(RectifiedFlow(**options), "speed", 20_000)
    before = law(BOUNDARY)
    kept = before + (1 - before) / 5

    def thinned(t: Array) -> Array:
        return (np.minimum(law(t), before) + np.maximum(0, law(t) - before) / 5) / kept

    distance = kstest(times.double().numpy(), thinned).statistic
    # As above, plus 1 / T: the boundary is rounded to the edge of a bin.
    assert distance < 1.95 / math.sqrt(20_000) + 1 / 1000


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("uniform", 0.077, 0.016),
        ("logit-normal", 0.0065, 0.0013),
        ("uniform, shift 3", 0.200, 0.048),
    ],
)
def test_probability_beyond_the_boundary_with_uniform_and_speed(
    name: str, before: float, after: float
) -> None:
    flow = RectifiedFlow(diffusion_steps=20_000, **LAWS[name][0])
    noisy = flow.schedule.sigma > 0.923
    # The published values have these digits, for a boundary rounded to 0.923. It is inside a bin: 1 / T.
    digit = 10.0 ** -len(str(after).partition(".")[2])
    masses = {
        p: float(build_policy(p, flow.schedule, "flow").density[noisy].sum()) for p in ("uniform", "speed")
    }
    assert masses["uniform"] == pytest.approx(before, abs=digit / 2 + 1 / 20_000)
    assert masses["speed"] == pytest.approx(after, abs=digit / 2 + 1 / 20_000)


def test_the_rows_are_the_quantiles_at_bin_midpoints() -> None:
    plain, straight = RectifiedFlow(diffusion_steps=50).schedule, NoiseSchedule.rectified_flow(50)
    assert_close(plain.sigma, straight.sigma, rtol=0, atol=0)
    assert_close(plain.alpha, straight.alpha, rtol=0, atol=0)
    for options, law in LAWS.values():
        schedule = RectifiedFlow(diffusion_steps=50, **options).schedule
        midpoints = (torch.arange(50).double() + 0.5) / 50
        # The quantile function and the distribution function are inverses, in float64.
        assert_close(torch.from_numpy(law(schedule.sigma.numpy())), midpoints, atol=1e-12, rtol=0)
        assert_close(schedule.alpha + schedule.sigma, torch.ones(50).double(), rtol=0, atol=1e-15)


def test_logit_normal_as_base_density_equals_logit_normal_as_policy() -> None:
    """A logit-normal base with a uniform policy has the same distribution as the reverse."""
    flow = RectifiedFlow(base_density="logit_normal", logit_mean=0.4, logit_std=0.8)
    config = {"type": "logit_normal", "mean": 0.4, "std": 0.8}
    density = build_policy(config, NoiseSchedule.rectified_flow(), "flow").density
    for edge in (0.2, 0.5, 0.9):
        # Equal up to one bin of the first.
        assert float((flow.schedule.sigma < edge).double().mean()) == pytest.approx(
            float(density[: round(edge * 1000)].sum()), abs=1e-3
        )


@pytest.mark.parametrize("name", LAWS)
def test_the_timestep_of_a_draw_is_in_its_bin(name: str) -> None:
    flow = RectifiedFlow(diffusion_steps=20, **LAWS[name][0])
    draw = build_policy("uniform", flow.schedule).draw(4000, generator=torch.Generator().manual_seed(0))
    timestep = flow.corrupt(torch.zeros(4000, 1), draw, generator=torch.Generator().manual_seed(1)).timestep
    edges = 1000 * flow.time(torch.arange(21).double() / 20)
    # draw.time and timestep are float32: an error of 6e-8 in u, times the slope of Q, and 6e-8 in t.
    assert (timestep >= edges[draw.index] - 1e-3).all()
    assert (timestep <= edges[draw.index + 1] + 1e-3).all()


@pytest.mark.parametrize("name", LAWS)
def test_time_rises_strictly_inside_zero_to_one(name: str) -> None:
    flow = RectifiedFlow(**LAWS[name][0])
    t = flow.time(torch.linspace(0, 1, 1001))
    assert t.dtype == torch.float64
    assert (t.diff() > 0).all()
    assert 0 < float(t[0].float()) < float(t[-1].float()) < 1
    ends = flow.corrupt(torch.ones(2, 1), at([0.0, 1.0]), noise=-torch.ones(2, 1))
    assert (ends.x_t.abs() < 1).all()
    assert 0 < ends.timestep[0] < ends.timestep[1] < 1000


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0])
def test_shift_keeps_both_ends_and_is_inverted_by_its_reciprocal(shift: float) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert shifted(t, shift)[[0, -1]].tolist() == pytest.approx([0.0, 1.0], abs=1e-15)
    assert_close(shifted(shifted(t, shift), 1 / shift), t, rtol=1e-12, atol=0)
    # The log-SNR changes by -2 ln s everywhere.
    inner, moved = t[1:-1], shifted(t, shift)[1:-1]
    change = 2 * (torch.logit(inner) - torch.logit(moved))
    assert_close(change, torch.full_like(change, -2 * math.log(shift)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [IMAGE, VIDEO])
def test_x_t_is_on_the_straight_path_and_the_target_is_its_velocity(shape: tuple[int, ...]) -> None:
    flow = RectifiedFlow(base_density="logit_normal", shift=2.0)
    x_0, noise, u = randn(shape, 0), randn(shape, 1), [0.0004, 0.25, 0.5, 0.77, 0.9999]
    noised = flow.corrupt(x_0, at(u), noise=noise)
    base = [1 / (1 + math.exp(-norm.ppf(p))) for p in at(u).time.double().tolist()]
    t = torch.tensor([2 * b / (1 + b) for b in base], dtype=torch.float64)
    assert_close(noised.timestep, (1000 * t).float(), rtol=1e-6, atol=0)
    column = t.reshape(-1, *[1] * (len(shape) - 1))
    # Two implementations of the normal quantile in float64.
    assert_close(noised.x_t, (1 - column) * x_0 + column * noise, rtol=0, atol=1e-10)
    assert_close(noised.target, noise - x_0, rtol=0, atol=0)
    # The velocity leads from x_t back to the data and on to the noise.
    assert_close(noised.x_t - column * noised.target, x_0, rtol=0, atol=1e-10)
    assert_close(noised.x_t + (1 - column) * noised.target, noise, rtol=0, atol=1e-10)
    assert noised.index.tolist() == at(u).index.tolist()


def test_corrupt_takes_noise_from_the_generator_and_widens_half_precision() -> None:
    x_0 = randn(IMAGE, 0).bfloat16()
    noised = RectifiedFlow().corrupt(x_0, at([0.5] * 5), generator=torch.Generator().manual_seed(3))
    expected = torch.randn(IMAGE, generator=torch.Generator().manual_seed(3))
    assert_close(noised.noise, expected, rtol=0, atol=0)
    assert (noised.x_t.dtype, noised.timestep.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("scope", ["mse", "loss"])
def test_loss_is_the_weighted_mean_squared_error_of_the_velocity(scope: str) -> None:
    flow, draw = RectifiedFlow(), at([0.1, 0.3, 0.5, 0.7, 0.9], weight=0.25, scope=scope)
    noised = flow.corrupt(randn(IMAGE, 0), draw, noise=randn(IMAGE, 1))
    offset = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    terms = flow.loss(noised.target + offset, noised, draw)
    mse = torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0], dtype=torch.float64)
    assert_close(terms.mse, mse)
    assert_close(terms.loss, 0.25 * mse)
    assert terms.vb.tolist() == [0.0] * 5


@pytest.mark.parametrize("name", LAWS)
def test_weights_of_speed_follow_the_closed_form_in_t_for_any_base(name: str) -> None:
    schedule = RectifiedFlow(**LAWS[name][0]).schedule
    t = schedule.sigma
    slope = 2 * t * (1 - t) / (1 - 2 * t + 2 * t**2) ** 2  # derivative of sigma^2 / (alpha^2 + sigma^2) by t
    scaled = (slope - slope.min()) / (slope.max() - slope.min())
    weight = build_policy("speed", schedule, "flow").weight.double()
    # Slopes are finite differences. At the ends they are one-sided, hence off by half a bin (at most 0.01 in
    # t) times the curvature of 4. The minimum is at an end and scales all of them: 0.2 * 0.04 / 2.
    assert_close(weight, 0.4 + 0.2 * scaled, rtol=0, atol=4e-3)


def test_the_boundary_of_speedit_is_at_the_same_t_for_any_base() -> None:
    starts = []
    for name in ("uniform", "uniform, shift 3"):
        schedule = RectifiedFlow(diffusion_steps=5000, **LAWS[name][0]).schedule
        starts.append(float(schedule.sigma[build_policy("speedit", schedule, "flow").boundary_index]))
    # With shift 3, a bin of u spans up to 3 / 5000 in t; the boundary is one bin after the crossing.
    assert starts[0] == pytest.approx(starts[1], abs=2 * 3 / 5000)


def test_the_registry_builds_it_by_the_config_keys() -> None:
    config = {
        "type": "RectifiedFlow",
        "diffusion_steps": 100,
        "base_density": "logit_normal",
        "logit_mean": 0.5,
        "logit_std": 2,
        "shift": 3,
    }
    flow = build(PROCESSES, config)
    assert (flow.schedule.num_timesteps, flow.prediction_type, flow.learn_sigma) == (100, "flow", False)
    # u = 0.5 is the median: the shifted median of the logit-normal distribution.
    median = 1 / (1 + math.exp(-0.5))
    assert float(flow.time(torch.tensor([0.5]))) == pytest.approx(3 * median / (1 + 2 * median), rel=1e-12)
    with pytest.raises(ValueError, match="has no parameter 'noise_schedule'"):
        build(PROCESSES, {"type": "RectifiedFlow", "noise_schedule": "linear"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0.0}, "shift needs a finite value > 0, got 0.0"),
        ({"shift": math.inf}, "shift needs a finite value > 0, got inf"),
        (
            {"base_density": "logit_norml"},
            "unknown base_density 'logit_norml'; did you mean 'logit_normal'.*known: logit_normal, uniform",
        ),
        ({"logit_mean": 0.0}, "no effect on base_density 'uniform', .*need None, got 0.0 and None"),
        ({"logit_std": 1.0}, "no effect on base_density 'uniform', .*need None, got None and 1.0"),
        ({"base_density": "logit_normal", "logit_std": 0.0}, "logit_std > 0, got 0.0 and 0.0"),
        ({"base_density": "logit_normal", "logit_mean": math.nan}, "finite logit_mean .*, got nan and 1.0"),
        ({"base_density": "logit_normal", "logit_std": 30.0}, "t needs to rise from bin to bin, .* 30.0"),
        ({"diffusion_steps": 1}, "needs diffusion_steps >= 2, got 1"),
    ],
)
def test_bad_options_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RectifiedFlow(**options)


def test_bad_batches_raise() -> None:
    flow, x_0, draw = RectifiedFlow(), randn(IMAGE, 0), at([0.5] * 5)
    with pytest.raises(ValueError, match=r"draw needs index shape \(5,\), got \(2,\)"):
        flow.corrupt(x_0, at([0.5] * 2))
    with pytest.raises(ValueError, match=r"draw needs time shape \(5,\), got \(1,\)"):
        flow.corrupt(x_0, TimestepDraw(draw.index, draw.time[:1], draw.weight))
    with pytest.raises(ValueError, match="noise needs x_0's shape"):
        flow.corrupt(x_0, draw, noise=x_0[:1])
    with pytest.raises(ValueError, match="x_0 needs floating point"):
        flow.corrupt(x_0.long(), draw)
    noised = flow.corrupt(x_0, draw, noise=x_0)
    with pytest.raises(ValueError, match=r"prediction needs shape \(5, 4, 4, 4\)"):
        flow.loss(torch.cat([x_0, x_0], dim=1), noised, draw)
