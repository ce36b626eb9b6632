import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import (
    NOT_PAIRED,
    PAIRED,
    POLICY_NAMES,
    SCHEDULES,
    build,
    configs,
    equivalents,
    schedules,
)
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.areas import (
    asymmetric,
    push_reflected,
    reflect,
    reflection_pivot,
    thinned,
)
from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.densities.over_time import logit_normal, uniform

LINEAR = NoiseSchedule.linear()


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.data(), schedules())
def test_every_policy_on_every_schedule_is_two_valid_tables(
    data: st.DataObject, schedule: NoiseSchedule
) -> None:
    T = schedule.num_timesteps
    policy = build(data.draw(configs(T)), schedule)
    for batch_size in (None, 1, 2, 3, 256):
        density = policy.density if batch_size is None else policy.density_for(batch_size)
        assert density.shape == (T,)
        assert density.dtype == torch.float64
        assert (density >= 0).all()
        # A sum of T terms that is 1: each addition rounds by about 1e-16.
        assert float(density.sum()) == pytest.approx(1.0, abs=1e-12)
    assert policy.weight.shape == (T,)
    assert torch.isfinite(policy.weight).all()
    assert (policy.weight >= 0).all()
    assert policy.boundary_index is None or 0 < policy.boundary_index <= T


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_weights_are_finite_for_every_prediction_type(schedule: object, prediction_type: str) -> None:
    assert callable(schedule)
    for name in POLICY_NAMES:
        for equivalent_to in equivalents(name):
            policy = build({"type": name, "equivalent_to": equivalent_to}, schedule(), prediction_type)
            assert torch.isfinite(policy.weight).all()
            assert (policy.weight >= 0).all()


# SpeeD


def test_speed_density_is_the_papers_formula() -> None:
    policy = build_policy("speed", LINEAR)
    # P = k / (T + tau (k - 1)), T = 1000, tau = 700, k = 5.
    expected = torch.full((1000,), 5 / 3800, dtype=torch.float64)
    expected[700:] = 1 / 3800
    assert_close(policy.density, expected)
    assert policy.boundary_index == 700
    assert float(policy.density[700:].sum()) == pytest.approx(300 / 3800)
    assert float(policy.density[700:].sum()) == pytest.approx(0.0789, abs=5e-5)


@pytest.mark.parametrize(
    ("schedule", "ceiling"),
    [
        (LINEAR, 1.43),
        (NoiseSchedule.cosine(), 1.06),
        (NoiseSchedule.scaled_linear(), 1.035),
        (NoiseSchedule.rectified_flow(), 1.084),
    ],
    ids=["linear", "cosine", "scaled-linear", "flow"],
)
def test_ceiling_of_dropping_convergence_samples(schedule: NoiseSchedule, ceiling: float) -> None:
    # For k -> infinity, a timestep before tau is drawn T / tau times as often as under uniform draws.
    policy = build_policy({"type": "speed", "k": 1e15}, schedule)
    # The numbers are published with two or three digits, and tau is exact to one index in 1000.
    digits = 0.005 if ceiling in (1.43, 1.06) else 0.001
    assert float(policy.density[0]) * 1000 == pytest.approx(ceiling, abs=digits)
    assert float(policy.density[0]) * policy.boundary_index == pytest.approx(1.0)


def test_thinning_by_index_and_by_snr_agree() -> None:
    snr = float(LINEAR.snr[299])
    assert_close(thinned(LINEAR, tau=300).table, thinned(LINEAR, snr_boundary=snr).table)
    assert thinned(LINEAR, tau=300).boundary_index == 300


@pytest.mark.parametrize("k", [0.2, 3.0])
def test_thinned_ratio_is_k(k: float) -> None:
    table = thinned(LINEAR, k=k).table
    assert float(table[0] / table[-1]) == pytest.approx(k)


def test_flow_mass_past_the_boundary() -> None:
    schedule = NoiseSchedule.rectified_flow()
    assert float(uniform(schedule).table[923:].sum()) == pytest.approx(0.077, abs=5e-4)
    assert float(thinned(schedule).table[923:].sum()) == pytest.approx(0.016, abs=5e-4)
    # Logit-normal draws have almost no mass there, so there is nothing to gain.
    assert float(logit_normal(schedule).table[923:].sum()) == pytest.approx(0.0065, abs=5e-5)


def test_nothing_to_thin_warns() -> None:
    with pytest.warns(UserWarning, match="equally often: k = 1"):
        table = thinned(LINEAR, k=1.0).table
    assert_close(table, uniform(LINEAR).table)
    clean = NoiseSchedule.from_betas([0.01] * 10)
    with pytest.warns(UserWarning, match="convergence area begins at index 10, the end"):
        thinned(clean)
    with pytest.warns(UserWarning, match="convergence area begins at index 1000, the end"):
        thinned(LINEAR, tau=1000)


# SpeeDiT


def numpy_p(alpha_bar: np.ndarray) -> np.ndarray:
    """p of the SpeeDiT README, with its own per-step constants at T = 1000."""
    slope = np.gradient(np.sqrt(1 - alpha_bar))
    p = np.tanh(1e6 * (slope - 1e-4)) + 1.5
    return p / p.sum()


def test_asymmetric_density_before_reflection() -> None:
    density = asymmetric(LINEAR, reflected=False)
    p = density.table.numpy()
    np.testing.assert_allclose(p, numpy_p(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))), rtol=1e-6)
    assert p[:600] / p[-1] == pytest.approx(5.0)
    # 99 % of the switch from 5 to 1 happens between the indices 639 and 643.
    assert (p[638] / p[-1], p[644] / p[-1]) == (pytest.approx(5, abs=0.04), pytest.approx(1, abs=0.04))
    assert p[642:].sum() == pytest.approx(0.1005, abs=5e-5)
    assert density.boundary_index == 642


def test_speedit_density_against_the_published_numbers() -> None:
    policy = build_policy("speedit", LINEAR)
    q = policy.density * 1000
    assert_close(q[:4], float64(0.879, 1.218, 1.474, 1.535), atol=5e-4, rtol=0)
    # The published value of each plateau is one number; its two ends differ by 0.001.
    assert_close(q[4:358], torch.full((354,), 1.543, dtype=torch.float64), atol=1.5e-3, rtol=0)
    assert_close(q[358:638], torch.full((280,), 1.402, dtype=torch.float64), atol=1.5e-3, rtol=0)
    assert_close(q[642], float64(0.879)[0], atol=5e-4, rtol=0)
    assert_close(q[646:], torch.full((354,), 0.140, dtype=torch.float64), atol=5e-4, rtol=0)
    assert float(policy.density[642:].sum()) == pytest.approx(0.0509, abs=5e-5)
    assert float((policy.density * policy.weight).sum()) == pytest.approx(0.5815, abs=5e-5)
    assert policy.boundary_index == 642


def test_speedit_importance_by_range() -> None:
    policy = build_policy("speedit", LINEAR)
    importance = policy.density * policy.weight / policy.mean_weight
    ranges = [(0, 100), (100, 219), (219, 358), (358, 642), (642, 700), (700, 1000)]
    shares = [float(importance[first:end].sum()) for first, end in ranges]
    assert shares == pytest.approx([0.010, 0.076, 0.211, 0.616, 0.015, 0.072], abs=5e-4)


def test_reflection_halves_p() -> None:
    p = asymmetric(LINEAR, reflected=False).table.numpy()
    q = np.zeros(1000)
    for t in range(1000):
        mirror = 642 - t if t < 642 else t - 642
        q[t] += p[t] / 2
        q[mirror] += p[t] / 2
    np.testing.assert_allclose(asymmetric(LINEAR).table.numpy(), q, rtol=1e-12)


def test_reflect_by_hand() -> None:
    index = torch.arange(6)
    assert reflect(index, 3, 6).tolist() == [3, 2, 1, 0, 1, 2]
    # With m = T, index 0 would go to T, one past the end.
    assert reflect(index, 6, 6).tolist() == [5, 5, 4, 3, 2, 1]
    assert_close(push_reflected(float64(0.1, 0.2, 0.3, 0.4), 3), float64(0.4, 0.3, 0.2, 0.1))


def test_pivot_is_one_past_the_first_flat_index_and_never_past_the_end() -> None:
    assert reflection_pivot(LINEAR) == 642
    assert reflection_pivot(NoiseSchedule.from_betas([0.01] * 10)) == 10
    # One past the last index is T itself, not T + 1.
    ends_flat = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1, 0.0999])
    assert ends_flat.flat_index() == 3
    assert reflection_pivot(ends_flat) == 4


@settings(derandomize=True, deadline=None, max_examples=60)
@given(schedules(), st.floats(0.01, 2.0))
def test_reflections_stay_inside_and_keep_the_mass(schedule: NoiseSchedule, threshold: float) -> None:
    T = schedule.num_timesteps
    pivot = reflection_pivot(schedule, threshold=threshold)
    assert 1 <= pivot <= T
    mirrored = reflect(torch.arange(T), pivot, T)
    assert ((mirrored >= 0) & (mirrored < T)).all()
    table = uniform(schedule).table
    assert float(push_reflected(table, pivot).sum()) == pytest.approx(1.0)


# Paired


def test_speed_reference_density_numbers() -> None:
    policy = build_policy("speed_reference", LINEAR)
    relative = policy.density * 1000
    assert_close(relative[1:58], torch.full((57,), 1.97, dtype=torch.float64), atol=5e-3, rtol=0)
    assert float(relative[57] / relative[58]) == pytest.approx(1.36, abs=5e-3)
    assert float(relative[1] / relative[0]) > 1.2
    assert policy.boundary_index == 700


def test_speed_reference_takes_seven_tenths_of_the_timesteps() -> None:
    assert build_policy("speed_reference", NoiseSchedule.linear(333)).boundary_index == 233
    assert build_policy({"type": "speed_reference", "tau": 120}, LINEAR).boundary_index == 120


def test_open_sora_reflects_around_its_own_crossing() -> None:
    policy = build_policy("open_sora_speed", LINEAR)
    p = asymmetric(LINEAR, reflected=False).table
    assert_close(policy.density, (p + push_reflected(p, LINEAR.flat_index(0.05) + 1)) / 2)


@pytest.mark.parametrize("name", PAIRED)
def test_paired_density_is_the_limit_of_large_batches(name: str) -> None:
    policy = build(name, NoiseSchedule.cosine(50))
    # A batch has n / 2 + 1 direct draws, so its mixture differs from the limit by at most 1 / n.
    assert_close(policy.density_for(10**6), policy.density, atol=1e-6, rtol=0)
    assert_close(policy.density_for(1), policy.density_for(2), atol=0, rtol=0)


@pytest.mark.parametrize("name", NOT_PAIRED)
def test_independent_density_does_not_depend_on_the_batch(name: str) -> None:
    policy = build(name, NoiseSchedule.cosine(50))
    for batch_size in (1, 2, 7):
        assert_close(policy.density_for(batch_size), policy.density, atol=0, rtol=0)


# Logit-normal


def test_logit_normal_bins_match_continuous_quantiles() -> None:
    cumulative = logit_normal(NoiseSchedule.rectified_flow()).table.cumsum(0)
    levels = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    index = torch.searchsorted(cumulative, levels)
    # The quantile of index + jitter is linear inside each bin.
    lower = torch.cat([float64(0.0), cumulative])[index]
    discrete = (index + (levels - lower) / (cumulative[index] - lower)) / 1000
    continuous = torch.sigmoid(torch.special.ndtri(levels))
    assert_close(discrete, continuous, atol=0.002, rtol=0)


def test_logit_normal_follows_mean_and_std() -> None:
    schedule = NoiseSchedule.rectified_flow()
    table = logit_normal(schedule, mean=0.5, std=0.7).table
    # P(u < 0.6) = Phi((logit(0.6) - 0.5) / 0.7), exact at a bin edge.
    z = (math.log(0.6 / 0.4) - 0.5) / 0.7
    assert float(table[:600].sum()) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), abs=1e-12)
    symmetric = logit_normal(schedule).table
    assert_close(symmetric, symmetric.flip(0), atol=1e-15, rtol=1e-9)


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: thinned(LINEAR, k=0.0), "thinned needs k > 0, got 0.0"),
        (lambda: thinned(LINEAR, k=float("nan")), "k > 0, got nan"),
        (lambda: thinned(LINEAR, k=math.inf), "k > 0, got inf"),
        (lambda: thinned(LINEAR, tau=0), r"tau needs to be an index in \(0, 1000\], got 0"),
        (lambda: thinned(LINEAR, tau=1001), r"in \(0, 1000\], got 1001"),
        (lambda: thinned(LINEAR, tau=0.7), "got 0.7"),
        (lambda: thinned(LINEAR, tau=True), "got True"),
        (
            lambda: thinned(LINEAR, tau=500, snr_boundary=0.1),
            "give tau or snr_boundary, got both: 500 and 0.1",
        ),
        (lambda: thinned(LINEAR, snr_boundary=1e9), r"no timestep has an SNR >= 1e\+09, the highest is 9999"),
        (lambda: thinned(LINEAR, snr_boundary=-1.0), "SNR boundary needs to be > 0, got -1.0"),
        (lambda: asymmetric(LINEAR, threshold=0.0), "threshold > 0 and sharpness > 0, got 0.0 and 1000.0"),
        (lambda: asymmetric(LINEAR, sharpness=-1.0), "got 0.1 and -1.0"),
        (lambda: asymmetric(NoiseSchedule.cosine(1)), "needs T >= 2, got T = 1"),
        (lambda: logit_normal(LINEAR, std=0.0), "finite mean and std > 0, got 0.0 and 0.0"),
        (lambda: logit_normal(LINEAR, mean=math.inf), "got inf and 1.0"),
        (lambda: Density(float64(0.0, 0.0)), "positive sum, got sum 0"),
        (lambda: Density(float64(2.0, -1.0)), "finite values >= 0"),
        (lambda: Density(float64(math.nan, 1.0)), "got sum nan"),
    ],
)
def test_a_bad_density_says_what_is_wrong(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
