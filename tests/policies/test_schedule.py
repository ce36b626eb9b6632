import math

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import SCHEDULES, schedules, zero_terminal
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule
from speedit_plugins.policies.schedule import CONVERGENCE_SNR


def float64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_linear_has_the_published_betas_and_their_cumulative_product() -> None:
    schedule = NoiseSchedule.linear()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), alpha_bar, rtol=1e-12)
    assert schedule.alphas_cumprod.dtype == torch.float64
    assert schedule.num_timesteps == schedule.num_original == 1000
    assert_close(schedule.timesteps, torch.arange(1000), atol=0, rtol=0)


def test_scaled_linear_is_linear_in_the_root_of_beta() -> None:
    alpha_bar = np.cumprod(1 - np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2)
    schedule = NoiseSchedule.scaled_linear()
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), alpha_bar, rtol=1e-12)


def test_cosine_follows_its_curve_until_the_clipped_end() -> None:
    u = np.arange(1, 1001) / 1000
    curve = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    alpha_bar = NoiseSchedule.cosine().alphas_cumprod.numpy()
    # The curve ends at beta = 1. This last beta is clipped to 0.999.
    np.testing.assert_allclose(alpha_bar[:-1], curve[:-1], rtol=1e-9)
    assert alpha_bar[-1] == pytest.approx(0.001 * alpha_bar[-2], rel=1e-12)


def test_rectified_flow_lies_on_bin_midpoints() -> None:
    schedule = NoiseSchedule.rectified_flow(4)
    assert_close(schedule.sigma, float64(0.125, 0.375, 0.625, 0.875))
    assert_close(schedule.alpha, float64(0.875, 0.625, 0.375, 0.125))
    assert_close(schedule.snr, float64(49.0, 25 / 9, 9 / 25, 1 / 49))


def test_snr_of_given_alpha_bar() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.99, 0.5, 0.0])
    assert_close(schedule.snr, float64(99.0, 1.0, 0.0))
    assert_close(schedule.log_snr, float64(math.log(99.0), 0.0, -math.inf))
    assert_close(schedule.alphas_cumprod, float64(0.99, 0.5, 0.0))


def test_betas_and_alpha_bar_describe_one_schedule() -> None:
    betas = [0.1, 0.2, 0.5]
    by_betas = NoiseSchedule.from_betas(betas)
    assert_close(by_betas.alphas_cumprod, float64(0.9, 0.72, 0.36))
    assert_close(NoiseSchedule.from_betas(torch.tensor(betas, dtype=torch.float64)).snr, by_betas.snr)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_hosts_numpy_tables_make_a_schedule(dtype: type) -> None:
    schedule = NoiseSchedule.linear()
    steps = even_250()
    table = schedule.alphas_cumprod.numpy()[steps].astype(dtype)
    respaced = NoiseSchedule.from_alphas_cumprod(table, np.array(steps), 1000)
    # In float32, 1 - alpha-bar = 1e-4 has a relative error of 6e-8 / 1e-4.
    assert_close(respaced.snr, schedule.snr[steps], rtol=1e-3, atol=0)
    assert respaced.timesteps.tolist() == steps
    assert respaced.convergence_index() == sum(step < 700 for step in steps)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(schedules())
def test_every_schedule_is_float64_with_falling_finite_snr(schedule: NoiseSchedule) -> None:
    for table in (schedule.alpha, schedule.sigma, schedule.snr, schedule.alphas_cumprod):
        assert table.dtype == torch.float64
        assert table.shape == (schedule.num_timesteps,)
        assert torch.isfinite(table).all()
    assert (schedule.snr.diff() <= 0).all()
    assert ((schedule.alphas_cumprod >= 0) & (schedule.alphas_cumprod < 1)).all()
    assert_close(schedule.snr, schedule.alphas_cumprod / (1 - schedule.alphas_cumprod), rtol=1e-9, atol=0)


# Areas


@pytest.mark.parametrize(
    ("schedule", "index"),
    [
        (NoiseSchedule.linear(), 700),
        (NoiseSchedule.scaled_linear(), 966),
        (NoiseSchedule.cosine(), 946),
        (NoiseSchedule.linear(4000), 2804),
        (NoiseSchedule.rectified_flow(), 923),
    ],
    ids=["linear", "scaled-linear", "cosine", "linear of 4000", "flow"],
)
def test_convergence_begins_at_the_published_place(schedule: NoiseSchedule, index: int) -> None:
    # The fractions of T are published with three digits, so they are exact to 0.0005 T.
    tau = schedule.convergence_index()
    assert abs(tau - index) <= 0.0005 * schedule.num_timesteps
    if schedule.num_timesteps == 1000:
        assert tau == index


def test_the_linear_boundary_is_the_papers_tau_and_a_twelfth() -> None:
    schedule = NoiseSchedule.linear()
    root = schedule.alphas_cumprod.sqrt()
    assert root[699] >= 1 / 12 > root[700]
    assert math.log(CONVERGENCE_SNR) == pytest.approx(-4.963, abs=5e-4)
    # alpha-bar = 1/144 means SNR = (1/144) / (143/144) = 1/143.
    assert math.isclose(CONVERGENCE_SNR, (1 / 144) / (1 - 1 / 144))
    assert NoiseSchedule.from_alphas_cumprod([0.5, 1 / 144, 1e-3]).convergence_index() == 2


def test_flow_boundary_solves_the_snr_equation() -> None:
    # (1 - t)^2 / t^2 = 1/143 at t = 1 / (1 + 1 / sqrt(143)) = 0.923, whatever T is.
    boundary = 1 / (1 + 1 / math.sqrt(143))
    assert boundary == pytest.approx(0.923, abs=5e-4)
    for num_timesteps in (10, 101, 1000, 5000):
        schedule = NoiseSchedule.rectified_flow(num_timesteps)
        midpoints = (np.arange(num_timesteps) + 0.5) / num_timesteps
        assert schedule.convergence_index() == (midpoints <= boundary).sum()


def test_an_index_does_not_transfer_between_schedules() -> None:
    assert float(NoiseSchedule.scaled_linear().snr[700]) == pytest.approx(0.09, abs=0.005)


def test_acceleration_ends_at_the_published_index() -> None:
    assert NoiseSchedule.linear().acceleration_index == 219


def test_meaningful_steps_of_linear() -> None:
    # m = 642 is one past the first flat index. Open-Sora's threshold of 0.05 gives about 700.
    schedule = NoiseSchedule.linear()
    assert schedule.flat_index(0.1) + 1 == 642
    assert abs(schedule.flat_index(0.05) + 1 - 700) <= 1


def test_no_flat_part_gives_the_number_of_timesteps() -> None:
    # On a short, clean schedule the slope of sqrt(1 - alpha-bar) per u never falls below 0.1.
    schedule = NoiseSchedule.from_betas([0.01] * 10)
    assert schedule.flat_index() == 10


def test_thresholds_per_u_do_not_depend_on_the_number_of_timesteps() -> None:
    for T in (200, 1000, 4000):
        schedule = NoiseSchedule.linear(T)
        # Tolerance: two indices for the O(1/T) error of scaled betas, and the last digit of the fractions.
        assert schedule.flat_index() / T == pytest.approx(0.641, abs=2 / T + 0.001)
        assert schedule.acceleration_index / T == pytest.approx(0.219, abs=2 / T + 0.001)


# Respacing


def even_250() -> list[int]:
    return [round(i * 999 / 249) for i in range(250)]


def test_respacing_keeps_noise_levels_and_names_the_original_timesteps() -> None:
    schedule = NoiseSchedule.linear()
    respaced = schedule.respaced([3, 10, 999])
    assert_close(respaced.snr, schedule.snr[[3, 10, 999]], atol=0, rtol=0)
    assert respaced.timesteps.tolist() == [3, 10, 999]
    assert (respaced.num_timesteps, respaced.num_original) == (3, 1000)
    twice = respaced.respaced([0, 2])
    assert twice.timesteps.tolist() == [3, 999]
    assert twice.num_original == 1000


def test_respacing_map_can_be_given_with_alpha_bar() -> None:
    schedule = NoiseSchedule.linear()
    steps = even_250()
    given_map = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod[steps], steps, 1000)
    assert_close(
        given_map.gradient(given_map.snr), schedule.respaced(steps).gradient(given_map.snr), rtol=1e-9, atol=0
    )


def test_gradient_is_numpys_on_the_original_timesteps() -> None:
    steps = [0, 1, 5, 20, 21, 400, 700, 999]
    respaced = NoiseSchedule.cosine().respaced(steps)
    table = respaced.alphas_cumprod
    expected = np.gradient(table.numpy(), np.array(steps, dtype=np.float64)) * 1000
    np.testing.assert_allclose(respaced.gradient(table).numpy(), expected, rtol=1e-12)


def test_gradient_of_a_parabola_is_exact_inside() -> None:
    # Second-order differences are exact for t^2, also with uneven gaps. The two ends are first order.
    respaced = NoiseSchedule.linear().respaced([0, 2, 3, 7, 100, 101])
    t = respaced.timesteps.double()
    assert_close(respaced.gradient(t**2)[1:-1], 2 * t[1:-1] * 1000)


def test_uneven_respacing_does_not_move_the_acceleration_boundary() -> None:
    steps = even_250()
    respaced = NoiseSchedule.linear().respaced(steps)
    # The boundary stays at 0.219 T, within two original steps at a spacing of four.
    assert abs(int(respaced.timesteps[respaced.acceleration_index]) - 219) <= 2
    # Differences over the index mistake a gap of 5 for a steep slope: 0.168 T.
    plain = int(np.gradient((1 - respaced.alphas_cumprod).numpy()).argmax())
    assert plain / 250 == pytest.approx(0.168, abs=5e-4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(schedules(), st.floats(0.01, 2.0), st.floats(1e-5, 10.0))
def test_boundaries_never_leave_the_schedule(schedule: NoiseSchedule, threshold: float, snr: float) -> None:
    T = schedule.num_timesteps
    assert 0 <= schedule.acceleration_index < T
    steepest = int(schedule.gradient((1 - schedule.alphas_cumprod).sqrt()).argmax())
    assert steepest <= schedule.flat_index(threshold) <= T
    tau = schedule.convergence_index(snr)
    assert 0 <= tau <= T
    # By definition, tau indices have at least this SNR. The comparison has a relative slack.
    assert (schedule.snr[:tau] >= snr * (1 - 1e-9)).all()
    assert (schedule.snr[tau:] < snr).all()


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_rescaling_to_zero_terminal_snr_is_that_of_diffusers(kind: str) -> None:
    schedule = getattr(NoiseSchedule, kind)()
    rescaled = schedule.zero_terminal_snr()
    bars = schedule.alphas_cumprod
    betas = 1 - bars / torch.cat([float64(1.0), bars[:-1]])
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    # Products of 1000 factors, in float64.
    assert_close(rescaled.alphas_cumprod, expected, rtol=1e-11, atol=1e-15)
    assert float(rescaled.alpha[-1]) == 0.0
    assert float(rescaled.alpha[0]) == pytest.approx(float(schedule.alpha[0]), rel=1e-15)
    # What ends at 0 already stays as it is.
    assert_close(rescaled.zero_terminal_snr().alpha, rescaled.alpha)


def test_rescaling_keeps_the_timesteps_of_a_respaced_schedule() -> None:
    kept = NoiseSchedule.linear().respaced([3, 500, 900]).zero_terminal_snr()
    assert (kept.timesteps.tolist(), kept.num_original) == ([3, 500, 900], 1000)


def test_zero_terminal_snr_is_allowed() -> None:
    schedule = zero_terminal(NoiseSchedule.scaled_linear())
    assert float(schedule.snr[-1]) == 0.0
    assert float(schedule.log_snr[-1]) == -math.inf
    assert schedule.convergence_index() < 1000


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseSchedule.linear(19), r"0.00526.* and 1.05.* at T = 19: needs T >= 20"),
        (lambda: NoiseSchedule.scaled_linear(11), "needs T >= 12"),
        (lambda: NoiseSchedule.linear(0), "num_timesteps needs to be >= 1, got 0"),
        (lambda: NoiseSchedule.cosine(-3), "got -3"),
        (lambda: NoiseSchedule.from_betas([]), r"needs shape \(T,\) with T >= 1, got \(0,\)"),
        (lambda: NoiseSchedule.from_betas([0.1, 0.0]), r"betas .* in \(0, 1\], got values from 0 to 0.1"),
        (lambda: NoiseSchedule.from_betas([[0.1]]), r"got shape \(1, 1\)"),
        (lambda: NoiseSchedule.from_alphas_cumprod([1.0, 0.5]), r"in \[0, 1\), got values from 0.5 to 1"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.9, float("nan")]), "alphas_cumprod needs"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.6]), "fall with the index .* got a rising one"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5], timesteps=[0]), "give both or neither"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5], num_original=9), "give both or neither"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.4], [3, 3], 9), "rise strictly"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.4], [3, 9], 9), r"in \[0, 9\), got \[3, 9\]"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5], [0, 1], 9), r"timesteps needs shape"),
        (lambda: NoiseSchedule.linear().respaced([]), r"respaced needs indices in \[0, 1000\), got \[\]"),
        (lambda: NoiseSchedule.linear().respaced([0, 1000]), r"indices in \[0, 1000\), got \[0, 1000\]"),
        (lambda: NoiseSchedule.linear().respaced([5, 3]), "the SNR needs to fall"),
        (lambda: NoiseSchedule.linear().convergence_index(0.0), "SNR boundary needs to be > 0, got 0.0"),
        (lambda: NoiseSchedule.rectified_flow().zero_terminal_snr(), "a variance-preserving schedule"),
        (lambda: NoiseSchedule.cosine(1).zero_terminal_snr(), "an SNR that falls, got the same at both ends"),
        (lambda: NoiseSchedule.rectified_flow(1).acceleration_index, "needs T >= 2, got T = 1"),
        (
            lambda: NoiseSchedule(float64(-1.0), float64(1.0), torch.arange(1), 1),
            "alpha needs finite values >= 0",
        ),
        (
            lambda: NoiseSchedule(float64(1.0), float64(0.0), torch.arange(1), 1),
            "sigma needs finite values > 0",
        ),
    ],
)
def test_a_bad_schedule_says_what_is_wrong(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_areas_stand_in_order(name: str) -> None:
    schedule = SCHEDULES[name]()
    assert 0 <= schedule.acceleration_index <= schedule.convergence_index() <= schedule.num_timesteps
