"""Laws over time and over log-SNR that papers and trainers draw from: closed forms, directions."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import zero_terminal
from scipy import stats
from scipy.integrate import quad
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.incomplete_beta import beta_tails
from speedit_plugins.policies.densities.over_log_snr import cauchy, laplace, log_snr_normal
from speedit_plugins.policies.densities.over_time import beta, cosmap, logit_normal, mode, u_shaped

LINEAR = NoiseSchedule.linear()
FLOW = NoiseSchedule.rectified_flow()
MAX_SCALE = 2 / (math.pi - 2)

Law = Callable[..., Density]
shapes = st.floats(0.05, 50.0)
OVER_TIME: dict[Law, dict[str, st.SearchStrategy[float]]] = {
    logit_normal: {"mean": st.floats(-3.0, 3.0), "std": st.floats(0.1, 5.0)},
    mode: {"scale": st.floats(-1.0, MAX_SCALE)},
    cosmap: {},
    beta: {"a": shapes, "b": shapes},
    u_shaped: {"a": st.floats(1e-3, 300.0)},
}
OVER_LOG_SNR: dict[Law, dict[str, st.SearchStrategy[float]]] = {
    log_snr_normal: {"mean": st.floats(-3.0, 3.0), "std": st.floats(0.3, 4.0)},
    laplace: {"mu": st.floats(-3.0, 3.0), "b": st.floats(0.2, 4.0)},
    cauchy: {"mu": st.floats(-3.0, 3.0), "gamma": st.floats(0.01, 10.0)},
}


@st.composite
def laws(draw: st.DrawFn, table: dict[Law, dict[str, st.SearchStrategy[float]]]) -> tuple[Law, Any]:
    law = draw(st.sampled_from(list(table)))
    return law, {name: draw(values) for name, values in table[law].items()}


# Over time


@settings(derandomize=True, deadline=None, max_examples=150)
@given(laws(OVER_TIME), st.integers(1, 60))
def test_two_bins_have_the_mass_of_the_bin_that_they_halve(case: tuple[Law, Any], T: int) -> None:
    law, options = case
    coarse, fine = (law(NoiseSchedule.rectified_flow(n), **options).table for n in (T, 2 * T))
    # Beta's own rounding is about 1e-13 for the largest of these shapes.
    assert_close(fine.reshape(T, 2).sum(1), coarse, atol=1e-12, rtol=0)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(laws(OVER_TIME), st.integers(1, 60))
def test_a_law_seen_from_the_other_end(case: tuple[Law, Any], T: int) -> None:
    law, options = case
    schedule = NoiseSchedule.rectified_flow(T)
    mirrored = {
        logit_normal: lambda: {**options, "mean": -options["mean"]},
        beta: lambda: {"a": options["b"], "b": options["a"]},
    }.get(law, lambda: options)()
    # 1 - u rounds by 1e-16, and a law's density is up to some 1e5 at the ends of these ranges.
    assert_close(law(schedule, **mirrored).table.flip(0), law(schedule, **options).table, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 1.29, MAX_SCALE])
def test_mode_is_the_law_of_its_formula(scale: float) -> None:
    # The share of v above v(u) is v's own value, so u is the formula of the mass above u.
    mass_below = mode(FLOW, scale=scale).table.cumsum(0)
    v = 1 - mass_below
    u = 1 - v - scale * (torch.cos(math.pi * v / 2) ** 2 - 1 + v)
    assert_close(u, torch.arange(1, 1001).double() / 1000, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("law", "options", "density"),
    [
        (cosmap, {}, lambda u: 2 / (math.pi * (1 - 2 * u + 2 * u**2))),
        (u_shaped, {"a": 4.0}, lambda u: 4 * (np.exp(4 * u) + np.exp(4 - 4 * u)) / (2 * np.expm1(4))),
        (u_shaped, {"a": 0.5}, lambda u: 0.5 * (np.exp(u / 2) + np.exp(0.5 - u / 2)) / (2 * np.expm1(0.5))),
        (logit_normal, {}, lambda u: stats.norm.pdf(np.log(u / (1 - u))) / (u * (1 - u))),
        (beta, {"a": 2.0, "b": 2.0}, lambda u: 6 * u * (1 - u)),
        (mode, {"scale": 0.0}, lambda u: 1.0),
    ],
)
def test_bins_have_the_integral_of_the_density(law: Law, options: Any, density: Any) -> None:
    table = law(NoiseSchedule.rectified_flow(10), **options).table
    wanted = [quad(density, i / 10, (i + 1) / 10, epsabs=1e-13)[0] for i in range(10)]
    np.testing.assert_allclose(table.numpy(), wanted, atol=1e-11)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_betas_tails_are_scipys(a: float, b: float) -> None:
    x = torch.linspace(0, 1, 41, dtype=torch.float64)
    below, above = beta_tails(x, a, b)
    np.testing.assert_allclose(below.numpy(), stats.beta.cdf(x.numpy(), a, b), atol=1e-11)
    np.testing.assert_allclose(above.numpy(), stats.beta.sf(x.numpy(), a, b), atol=1e-11)


def test_far_bins_keep_their_mass() -> None:
    # From the other tail each would be a difference of two values that round to 1.
    last = float(logit_normal(FLOW, mean=-2.0, std=0.7).table[-2])
    z = (math.log(998 / 2) + 2) / 0.7, (math.log(999) + 2) / 0.7
    assert last == pytest.approx(stats.norm.sf(z[0]) - stats.norm.sf(z[1]), rel=1e-9, abs=0)
    assert float(beta(FLOW, a=1.0, b=8.0).table[-1]) == pytest.approx(1e-3**8, rel=1e-9, abs=0)
    assert float(laplace(LINEAR, b=0.2).table[-2]) > 0
    # exp(1000) is infinite in float64.
    steep = u_shaped(FLOW, a=1000.0).table
    assert_close(steep[:3], (1 - math.exp(-1)) / 2 * torch.exp(-torch.arange(3).double()))


# Over log-SNR


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(), FLOW], ids=["linear", "cosine", "flow"])
@pytest.mark.parametrize(
    ("law", "options", "reference"),
    [
        (laplace, {"mu": 0.7, "b": 0.6}, stats.laplace(0.7, 0.6)),
        (cauchy, {"mu": -0.7, "gamma": 0.4}, stats.cauchy(-0.7, 0.4)),
        (log_snr_normal, {"mean": 2.4, "std": 2.4}, stats.norm(2.4, 2.4)),
    ],
)
def test_log_snr_follows_the_law_cut_at_the_ends(
    law: Law, options: Any, reference: Any, schedule: NoiseSchedule
) -> None:
    log_snr = schedule.log_snr.numpy()
    edges = np.concatenate([log_snr[:1], (log_snr[1:] + log_snr[:-1]) / 2, log_snr[-1:]])
    mass = -np.diff(reference.cdf(edges))
    wanted = mass / (reference.cdf(log_snr[0]) - reference.cdf(log_snr[-1]))
    np.testing.assert_allclose(law(schedule, **options).table.numpy(), wanted, atol=1e-12)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(laws(OVER_LOG_SNR), st.floats(0.2, 5.0))
def test_data_of_another_scale_want_another_centre_and_nothing_else(
    case: tuple[Law, Any], factor: float
) -> None:
    law, options = case
    # Data c times as large at the same noise: log-SNR as seen by a law for the old data is lower by 2 ln c.
    scaled = NoiseSchedule(LINEAR.alpha / factor, LINEAR.sigma, LINEAR.timesteps, 1000)
    centre = next(iter(options))
    moved = {**options, centre: options[centre] - 2 * math.log(factor)}
    assert_close(law(scaled, **moved).table, law(LINEAR, **options).table, atol=1e-12, rtol=0)


@pytest.mark.parametrize("law", [laplace, cauchy])
def test_pure_noise_is_drawn_as_often_as_by_uniform_draws(law: Law) -> None:
    table = law(zero_terminal(LINEAR)).table
    assert float(table[-1]) == pytest.approx(1e-3)
    assert float(table[:-1].sum()) == pytest.approx(0.999)


@pytest.mark.parametrize("law", [laplace, cauchy])
def test_a_centre_outside_the_schedule_is_warned_of(law: Law) -> None:
    with pytest.warns(UserWarning, match=rf"{law.__name__} is centred at log-SNR 10.00, outside .* to 9.21"):
        law(LINEAR, mu=10.0)


# Directions: what each release draws, in its own count of time


def mass_where(policy: str | dict[str, Any], is_there: Tensor, schedule: NoiseSchedule = FLOW) -> float:
    return float(build_policy(policy, schedule, "v").density[is_there].sum())


def test_jit_counts_time_from_the_noise() -> None:
    # Its t is sigmoid(-0.8 + 0.8 z), and x_t = t x_0 + (1 - t) noise. t > 1/2 where z > 1.
    is_clean = FLOW.alpha > FLOW.sigma
    assert mass_where("jit", is_clean) == pytest.approx(stats.norm.sf(1), abs=1e-12)


def test_mixflow_and_b_ttdm_draw_clean_timesteps_more_often() -> None:
    # MixFlow's release: t = 1 - sqrt(v) with v uniform, t = 1 the noise. t < 0.1 where v > 0.81.
    mixflow = {"type": "beta", "a": 1.0, "b": 2.0}
    assert mass_where(mixflow, FLOW.sigma < 0.1) == pytest.approx(0.19, abs=1e-12)
    # OneTrainer's B-TTDM: v^(1 / 0.8) of the T timesteps, timestep 0 the cleanest.
    assert mass_where("beta", FLOW.sigma < 0.5) == pytest.approx(0.5**0.8, abs=1e-12)


@pytest.mark.parametrize(("name", "mean", "std"), [("edm", -1.2, 1.2), ("edm2", -0.4, 1.0)])
def test_edm_draws_the_logarithm_of_sigma(name: str, mean: float, std: float) -> None:
    for sigma in (0.1, 0.5, 2.0):
        below = mass_where(name, LINEAR.sigma / LINEAR.alpha < sigma, LINEAR)
        # The timestep at sigma has at most 0.4 % of the mass, and half of it may be on the wrong side. The
        # schedule cuts off less than 0.4 %: ln sigma < -4.6, at the clean end.
        assert below == pytest.approx(stats.norm.cdf(math.log(sigma), mean, std), abs=6e-3)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mode(FLOW, scale=1.8), r"scale in \[-1, 2 / \(pi - 2\) = 1.7519\], got 1.8"),
        (lambda: mode(FLOW, scale=-1.01), r"got -1.01"),
        (lambda: mode(FLOW, scale=math.nan), r"got nan"),
        (lambda: beta(FLOW, a=0.0), "beta needs a > 0 and b > 0, got 0.0 and 1.0"),
        (lambda: beta(FLOW, b=math.inf), "got 0.8 and inf"),
        (lambda: beta(FLOW, a=1e13, b=1e13), r"smaller a and b, got 1e\+13 and 1e\+13: .* too narrow"),
        (lambda: u_shaped(FLOW, a=0.0), "u_shaped needs a > 0, got 0.0"),
        (lambda: u_shaped(FLOW, a=math.inf), "got inf"),
        (lambda: laplace(FLOW, b=0.0), "laplace needs a finite mu and b > 0, got 0.0 and 0.0"),
        (lambda: laplace(FLOW, mu=math.inf), "got inf and 0.5"),
        (
            lambda: laplace(FLOW, mu=1000.0),
            "mu near the schedule's log-SNR, -15.20 to 15.20, got 1000.00",
        ),
        (lambda: laplace(NoiseSchedule.cosine(1)), "laplace needs T >= 2, got T = 1 with SNR > 0"),
        (lambda: cauchy(FLOW, gamma=0.0), "cauchy needs a finite mu and gamma > 0, got 0.0 and 0.0"),
        (lambda: cauchy(FLOW, mu=math.nan), "got nan and 1.0"),
    ],
)
def test_a_bad_law_says_what_is_wrong(make: Callable[[], Density], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
