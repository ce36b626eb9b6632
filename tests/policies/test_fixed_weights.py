"""Weights that papers and trainers put on their losses: closed forms, on each type's loss."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import zero_terminal
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.over_time import cosmap as cosmap_density
from speedit_plugins.policies.weightings.by_noise_level import (
    debiased,
    edm,
    min_snr,
    soft_min_snr,
    truncated_snr,
)
from speedit_plugins.policies.weightings.by_time import bell, cosmap, sigma_sqrt
from speedit_plugins.policies.weightings.conversion import converted

LINEAR = NoiseSchedule.linear()
FLOW = NoiseSchedule.rectified_flow()
# Noise is added to the data, whose scale stays: sigma / alpha is the noise level.
ADDED = NoiseSchedule(
    torch.ones(50, dtype=torch.float64), torch.logspace(-2, 2, 50).double(), torch.arange(50), 50
)
ZERO_TERMINAL = zero_terminal(LINEAR)


def weight_of(name: str, schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    return build_policy({"density": "uniform", "weighting": name}, schedule, prediction_type).weight


@pytest.mark.parametrize(
    ("name", "on_epsilon", "on_v"),
    [
        ("soft_min_snr", lambda snr: 4 / (snr + 4), lambda snr: 4 * snr / ((snr + 4) * (snr + 1))),
        (
            "debiased",
            lambda snr: 1 / snr.clamp(max=1000).sqrt(),
            lambda snr: snr / (snr + 1) / snr.clamp(max=1000).sqrt(),
        ),
        ("truncated_snr", lambda snr: snr.clamp(min=1) / snr, lambda snr: snr.clamp(min=1) / (snr + 1)),
        ("edm", lambda snr: 1 + 4 / snr, lambda snr: (snr + 4) / (snr + 1)),
    ],
)
def test_weights_of_the_noise_level(name: str, on_epsilon: Callable, on_v: Callable) -> None:
    snr = LINEAR.snr
    assert_close(weight_of(name, LINEAR, "epsilon"), on_epsilon(snr))
    assert_close(weight_of(name, LINEAR, "v"), on_v(snr))
    assert_close(weight_of(name, LINEAR, "x0"), on_epsilon(snr) * snr)
    # On the straight path, x0 = x_t - t velocity: an error in the velocity is t times as large in x0.
    assert_close(weight_of(name, FLOW, "flow"), on_epsilon(FLOW.snr) * FLOW.snr * FLOW.sigma**2)


@pytest.mark.parametrize(
    ("name", "on_flow"),
    [
        ("sigma_sqrt", lambda t: t**-2),
        ("cosmap", lambda t: 2 / (math.pi * (1 - 2 * t + 2 * t**2))),
    ],
)
def test_weights_of_time(name: str, on_flow: Callable) -> None:
    t = FLOW.sigma
    assert_close(weight_of(name, FLOW, "flow"), on_flow(t))
    assert_close(weight_of(name, FLOW, "x0"), on_flow(t) / t**2)
    assert_close(weight_of(name, FLOW, "epsilon"), on_flow(t) / (1 - t) ** 2)
    # Elsewhere the weight belongs to the noise level. Time and x0 are then those of the straight path.
    t = LINEAR.sigma / (LINEAR.alpha + LINEAR.sigma)
    assert_close(weight_of(name, LINEAR, "x0"), on_flow(t) / t**2)


def test_at_snr_0_weights_are_finite_on_every_loss_but_that_of_epsilon() -> None:
    # alpha 0 and sigma 1: an error in v or in the velocity is as large as that in x0.
    ends = {"debiased": 0.0, "truncated_snr": 1.0, "edm": 4.0, "sigma_sqrt": 1.0, "cosmap": 2 / math.pi}
    for name, end in ends.items():
        for prediction_type in ("x0", "v", "flow"):
            weight = weight_of(name, ZERO_TERMINAL, prediction_type)
            assert torch.isfinite(weight).all()
            assert float(weight[-1]) == pytest.approx(end)
        with pytest.raises(ValueError, match="infinite on the epsilon loss at SNR 0: wanted .* model of x0"):
            weight_of(name, ZERO_TERMINAL, "epsilon")


@settings(derandomize=True, deadline=None, max_examples=50)
@given(st.floats(0.01, 100.0))
def test_soft_min_snr_is_between_min_snr_and_its_half(gamma: float) -> None:
    sharp, soft = min_snr(LINEAR, gamma=gamma), soft_min_snr(LINEAR, gamma=gamma)
    assert (soft <= sharp * (1 + 1e-12)).all()
    assert (soft >= sharp / 2 * (1 - 1e-12)).all()


@pytest.mark.parametrize("data_std", [0.5, 0.6162])
def test_k_diffusions_preconditioned_losses(data_std: float) -> None:
    """x0 = c_skip x_t + c_out F: a weight on the loss of F is c_out^2 times that on the loss of x0."""
    noise = ADDED.sigma
    total = noise**2 + data_std**2
    c_out = noise * data_std / total.sqrt()
    ones = torch.ones_like(noise)
    assert_close(edm(ADDED, data_std=data_std) * c_out**2, ones)
    soft = converted(soft_min_snr(ADDED, gamma=data_std**-2), ADDED, "x0", source="epsilon")
    assert_close(soft * c_out**2, (noise * data_std) ** 2 / total**2)


def test_edm_for_data_of_variance_1_is_weight_1_on_v() -> None:
    ones = converted(edm(LINEAR, data_std=1.0), LINEAR, "v", source="x0")
    assert_close(ones, torch.ones_like(ones))


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.floats(0.1, 10.0), st.floats(0.1, 10.0))
def test_edm_of_scaled_data_is_the_same_share_of_their_variance(data_std: float, factor: float) -> None:
    # The loss of x0 grows by the square of the factor, so its weight falls by it.
    scaled = NoiseSchedule(LINEAR.alpha / factor, LINEAR.sigma, LINEAR.timesteps, 1000)
    found = edm(scaled, data_std=factor * data_std) * factor**2
    assert_close(found, edm(LINEAR, data_std=data_std), rtol=1e-9, atol=0)


def test_truncated_snr_is_the_larger_of_two_losses() -> None:
    # The release takes max(x0's loss, epsilon's loss). Epsilon's is SNR times that of x0.
    on_epsilon = converted(torch.ones_like(LINEAR.snr), LINEAR, "x0", source="epsilon")
    assert_close(truncated_snr(LINEAR), torch.maximum(torch.ones_like(on_epsilon), on_epsilon))


def test_the_debiased_limit_is_1000() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9999, 0.8])  # SNR 9999 and 4
    weight = build_policy("debiased", schedule).weight
    assert weight.tolist() == pytest.approx([1000**-0.5, 0.5])
    assert_close(debiased(schedule, max_snr=math.inf), schedule.snr.sqrt())


def test_sigma_sqrt_of_x0_is_the_plain_loss_of_a_flow() -> None:
    # Diffusers' scripts for Stable Diffusion 3 put s^-2 on the loss of x0.
    plain = converted(torch.ones_like(FLOW.snr), FLOW, "x0", source="flow")
    assert_close(plain, sigma_sqrt(FLOW))
    assert build_policy("sigma_sqrt", FLOW).mean_weight == pytest.approx(1)


def test_cosmap_as_a_weight_is_cosmap_as_a_density() -> None:
    # A bin's mass differs from the density at its middle by second order: |p''| / 24 T^2 <= 16 / 24 T^2.
    assert_close(cosmap(FLOW), 1000 * cosmap_density(FLOW).table, atol=1e-6, rtol=0)


def test_bell_is_symmetric_has_mean_1_and_is_what_trainers_have() -> None:
    weight = bell(FLOW)
    assert_close(weight, weight.flip(0))
    assert float(weight.mean()) == pytest.approx(1)
    # ai-toolkit and DiffSynth-Studio, at u = i / 1000. The slope is at most 4.9, and u is off by 1 / 2000.
    i = torch.arange(1000).double()
    theirs = torch.exp(-2 * ((i - 500) / 1000) ** 2)
    theirs = theirs - theirs.min()
    assert_close(weight, theirs / theirs.mean(), atol=2.5e-3, rtol=0)
    # It is a function of time, so respacing leaves it where it is. Bins get 4 times as wide.
    respaced = bell(FLOW.respaced(range(2, 1000, 4)))
    assert_close(respaced, weight[2::4], atol=1e-4, rtol=0)
    assert bell(NoiseSchedule.rectified_flow(1)).tolist() == [1.0]


def test_bell_multiplies_the_hosts_own_loss() -> None:
    for prediction_type in ("epsilon", "v"):
        assert torch.equal(build_policy("bell", LINEAR, prediction_type).weight, bell(LINEAR))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: soft_min_snr(LINEAR, gamma=0.0), "soft_min_snr needs gamma > 0, got 0.0"),
        (lambda: soft_min_snr(LINEAR, gamma=math.inf), "got inf"),
        (lambda: debiased(LINEAR, max_snr=0.0), "debiased needs max_snr > 0, got 0.0"),
        (lambda: debiased(LINEAR, max_snr=math.nan), "got nan"),
        (lambda: edm(LINEAR, data_std=0.0), "edm needs data_std > 0, got 0.0"),
        (lambda: edm(LINEAR, data_std=math.inf), "got inf"),
        (
            lambda: build_policy({"type": "truncated_snr", "equivalent_to": "host"}, LINEAR),
            "truncated_snr always converts from the x0 loss: leave out equivalent_to='host'",
        ),
        (
            lambda: build_policy({"type": "sigma_sqrt", "equivalent_to": "epsilon"}, FLOW),
            "sigma_sqrt always converts from the flow loss: leave out equivalent_to='epsilon'",
        ),
    ],
)
def test_a_bad_weight_says_what_is_wrong(make: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
