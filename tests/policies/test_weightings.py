import itertools

import numpy as np
import pytest
import torch
from policy_cases import DEFINED_ON, INFINITE_ON_EPSILON, POLICY_NAMES, build, equivalents, zero_terminal
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.weightings.by_noise_level import (
    change_aware,
    constant,
    inverse_density,
    min_snr,
    p2,
)
from speedit_plugins.policies.weightings.conversion import check_prediction_type, converted, defined_on

LINEAR = NoiseSchedule.linear()


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_constant_is_one() -> None:
    assert_close(constant(LINEAR), torch.ones(1000, dtype=torch.float64), atol=0, rtol=0)


# Change-aware


def test_change_aware_is_its_formula() -> None:
    change = np.gradient(1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    scaled = (change - change.min()) / (change.max() - change.min())
    np.testing.assert_allclose(change_aware(LINEAR).numpy(), 0.4 + 0.2 * scaled, rtol=1e-9)


def test_speed_weights_against_the_published_numbers() -> None:
    policy = build_policy("speed", LINEAR)
    assert float(policy.weight.min()) == pytest.approx(0.4)
    assert float(policy.weight.max()) == pytest.approx(0.6)
    assert int(policy.weight.argmax()) == 219
    assert policy.mean_weight == pytest.approx(0.4965, abs=5e-5)


def test_speed_reference_weights_against_the_published_numbers() -> None:
    policy = build_policy("speed_reference", LINEAR)
    assert float(policy.weight[:700].min()) == pytest.approx(0.407, abs=5e-4)
    assert float(policy.weight[:700].max()) == pytest.approx(0.6)
    assert_close(policy.weight[700:], torch.ones(300, dtype=torch.float64), atol=0, rtol=0)
    assert policy.mean_weight == pytest.approx(0.528, abs=5e-4)


def test_lam_of_a_half_is_constant_and_one_spans_everything() -> None:
    assert_close(change_aware(LINEAR, lam=0.5), torch.full((1000,), 0.5, dtype=torch.float64))
    whole = change_aware(LINEAR, lam=1.0)
    assert (float(whole.min()), float(whole.max())) == (pytest.approx(0.0), pytest.approx(1.0))


def test_change_aware_on_a_straight_line_of_alpha_bar_is_constant() -> None:
    # d(1 - alpha-bar)/dt is constant, so all weights are equal. Steps of 1/4 are exact in binary.
    schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5, 0.25])
    assert_close(change_aware(schedule), torch.full((3,), 0.4, dtype=torch.float64))


def test_change_aware_on_flow_is_the_derivative_of_the_noise_share() -> None:
    schedule = NoiseSchedule.rectified_flow()
    t = schedule.sigma
    lam = 0.6
    # v = t^2 / ((1 - t)^2 + t^2) has dv/dt = 2 t (1 - t) / (1 - 2 t + 2 t^2)^2, at most 2 (at t = 1/2).
    change = 2 * t * (1 - t) / (1 - 2 * t + 2 * t**2) ** 2
    # At the first midpoint dv/dt / 2 is 1 / 2T, not 0, and minmax shifts by it. First-order ends add as much.
    assert_close(change_aware(schedule, lam=lam), (1 - lam) + (2 * lam - 1) * change / 2, atol=1e-3, rtol=0)


def test_change_aware_does_not_depend_on_respacing() -> None:
    steps = [round(i * 999 / 249) for i in range(250)]
    respaced = LINEAR.respaced(steps)
    expected = change_aware(LINEAR)[steps]
    # First-order differences at the ends are off by half a gap: 2.5 steps of 0.2 / 219 each.
    assert_close(change_aware(respaced), expected, atol=0.0025, rtol=0)
    # Differences over the index treat gaps of 4 and 5 as equal. This scales the peak by 9/8.
    plain = np.gradient(1 - respaced.alphas_cumprod.numpy())
    plain = 0.4 + 0.2 * (plain - plain.min()) / (plain.max() - plain.min())
    assert np.abs(plain - expected.numpy()).max() > 0.01


# P2, Min-SNR, inverse density


def test_p2_with_ones_is_one_minus_alpha_bar() -> None:
    assert_close(p2(LINEAR), 1 - LINEAR.alphas_cumprod, rtol=1e-12, atol=0)
    assert_close(build_policy("p2", LINEAR).weight, 1 - LINEAR.alphas_cumprod, rtol=1e-12, atol=0)
    assert_close(build_policy("speedit", LINEAR).weight, 1 - LINEAR.alphas_cumprod, rtol=1e-12, atol=0)


def test_p2_by_hand() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.75, 0.5, 0.0])  # SNR 3, 1, 0
    assert_close(p2(schedule, gamma=0.5, k=1.0), float64(0.5, 0.5**0.5, 1.0))
    assert_close(p2(schedule, gamma=2.0, k=2.0), float64(1 / 25, 1 / 9, 1 / 4))
    assert_close(p2(schedule, gamma=0.0), float64(1, 1, 1))


def test_min_snr_by_hand() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.99, 0.5, 0.0])  # SNR 99, 1, 0
    assert_close(min_snr(schedule, gamma=5.0), float64(5 / 99, 1.0, 1.0))


def test_min_snr_per_prediction_type() -> None:
    snr = LINEAR.snr
    clipped = snr.clamp(max=5.0)
    expected = {"epsilon": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}
    for prediction_type, weight in expected.items():
        assert_close(build_policy("min_snr", LINEAR, prediction_type).weight, weight)
    flow = NoiseSchedule.rectified_flow()
    t = flow.sigma
    weight = torch.minimum((1 - t) ** 2, 5 * t**2)
    assert_close(build_policy("min_snr", flow, "flow").weight, weight)


def test_without_a_prediction_type_a_rectified_flow_predicts_its_velocity() -> None:
    straight = NoiseSchedule.rectified_flow(50)
    for config in ("min_snr", {"type": "speed", "equivalent_to": "epsilon"}):
        for schedule, usual in ((straight, "flow"), (LINEAR, "epsilon")):
            given = build_policy(config, schedule, usual)
            assert torch.equal(build_policy(config, schedule).weight, given.weight)
        by_epsilon = build_policy(config, straight, "epsilon").weight
        assert_close(by_epsilon * straight.alpha**2, build_policy(config, straight).weight)


def test_on_other_schedules_converted_weights_need_a_prediction_type() -> None:
    # EDM: noise is added to data of standard deviation 1/2.
    added = NoiseSchedule(float64(0.5, 0.5), float64(0.1, 9.0), torch.arange(2), 2)
    with pytest.raises(ValueError, match="need prediction_type on NoiseSchedule.* wanted one of epsilon, x0"):
        build_policy("min_snr", added)
    assert_close(build_policy("min_snr", added, "x0").weight, added.snr.clamp(max=5.0))
    assert_close(build_policy("p2", added).weight, 1 / (1 + added.snr))


def test_min_snr_of_v_on_stable_diffusions_schedule() -> None:
    weight = build_policy("min_snr", NoiseSchedule.scaled_linear(), "v").weight
    assert weight[[0, 500, 999]].tolist() == pytest.approx([0.004, 0.276, 0.005], abs=5e-4)


@pytest.mark.parametrize("prediction_type", ["epsilon", "x0", "v"])
def test_zero_terminal_snr_gives_the_limit_of_the_weight(prediction_type: str) -> None:
    schedule = zero_terminal(NoiseSchedule.scaled_linear())
    for name in POLICY_NAMES:
        config = {"type": name, "equivalent_to": equivalents(name)[-1]}
        if name in INFINITE_ON_EPSILON and prediction_type == "epsilon":
            wanted = f"defined on the {DEFINED_ON[name]} loss are infinite on the epsilon loss at SNR 0"
            with pytest.raises(ValueError, match=wanted):
                build_policy(config, schedule, prediction_type)
            continue
        weight = build(config, schedule, prediction_type).weight
        assert torch.isfinite(weight).all()
        # On x0 and v losses, a weight of the epsilon loss has the factor SNR, and the SNR ends at 0. One that
        # is learned from the model's own loss needs no conversion.
        if prediction_type != "epsilon" and name not in (*INFINITE_ON_EPSILON, "uncertainty"):
            assert float(weight[-1]) == 0.0
    assert float(build_policy("min_snr", schedule).weight[-1]) == 1.0


def test_inverse_density_by_hand() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5])
    assert_close(inverse_density(schedule, density=float64(0.2, 0.8)), float64(2.5, 0.625))


def test_inverse_density_composes_with_any_density() -> None:
    policy = build_policy({"density": "thinned", "weighting": "inverse_density"}, LINEAR)
    assert_close(policy.density * policy.weight, torch.full((1000,), 1e-3, dtype=torch.float64))


# Conversion between prediction types


def errors_of_one_prediction(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """Squared error at each timestep, (T,) float64, of one prediction expressed as each type."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise, guess = torch.randn(
        3, schedule.num_timesteps, 16, dtype=torch.float64, generator=generator
    ).unbind()
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    x_t = alpha * x_0 + sigma * noise
    x_0_guess = (x_t - sigma * guess) / alpha
    pairs = {
        "epsilon": (noise, guess),
        "x0": (x_0, x_0_guess),
        "v": (alpha * noise - sigma * x_0, alpha * guess - sigma * x_0_guess),
        "flow": (noise - x_0, guess - x_0_guess),
    }
    return {name: ((target - value) ** 2).mean(dim=1) for name, (target, value) in pairs.items()}


@pytest.mark.parametrize(
    "schedule",
    [LINEAR, NoiseSchedule.scaled_linear(), NoiseSchedule.rectified_flow()],
    ids=["linear", "scaled-linear", "flow"],
)
def test_converted_weights_give_one_objective(schedule: NoiseSchedule) -> None:
    errors = errors_of_one_prediction(schedule)
    # The error in the velocity is a fixed multiple of that in x0 only on the straight path.
    types = [name for name in errors if name != "flow" or not schedule.is_variance_preserving]
    weight = p2(schedule, gamma=0.7)
    for source, target in itertools.product(types, types):
        found = converted(weight, schedule, target, source=source)
        # The x0 error is divided by alpha >= 0.006, so rounding has a relative size of 1e-16 / 0.006^2.
        assert_close(found * errors[target], weight * errors[source], rtol=1e-9, atol=0)
        assert_close(converted(found, schedule, source, source=target), weight, rtol=1e-9, atol=0)


def test_host_weights_multiply_whatever_the_host_predicts() -> None:
    by_epsilon = build_policy("speed", LINEAR).weight
    for prediction_type in ("x0", "v"):
        assert_close(build_policy("speed", LINEAR, prediction_type).weight, by_epsilon, atol=0, rtol=0)
        explicit = build_policy({"type": "speed", "equivalent_to": "host"}, LINEAR, prediction_type)
        assert_close(explicit.weight, by_epsilon, atol=0, rtol=0)


def test_equivalent_to_epsilon_converts() -> None:
    for name in ("speed", "speedit", "p2"):
        by_epsilon = build_policy(name, LINEAR).weight
        by_v = build_policy({"type": name, "equivalent_to": "epsilon"}, LINEAR, "v").weight
        assert_close(by_v, by_epsilon * LINEAR.snr / (LINEAR.snr + 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: change_aware(LINEAR, lam=5), r"lam in \[0.5, 1\], got 5: .* between 1 - lam and lam"),
        (lambda: change_aware(LINEAR, lam=0.4), "got 0.4"),
        (lambda: change_aware(LINEAR, tau=700), "give both or neither, got tau=700, beyond=None"),
        (lambda: change_aware(LINEAR, beyond=1.0), "got tau=None, beyond=1.0"),
        (lambda: change_aware(LINEAR, tau=700, beyond=-1.0), "beyond >= 0, got -1.0"),
        (lambda: change_aware(LINEAR, tau=2000, beyond=1.0), r"tau .* \(0, 1000\], got 2000"),
        (lambda: change_aware(NoiseSchedule.cosine(1)), "T >= 2"),
        (lambda: p2(LINEAR, k=0.0), "gamma >= 0 and k > 0, got 1.0 and 0.0"),
        (lambda: p2(LINEAR, gamma=-1.0), "got -1.0 and 1.0"),
        (lambda: min_snr(LINEAR, gamma=0.0), "min_snr needs gamma > 0, got 0.0"),
        (
            lambda: inverse_density(NoiseSchedule.from_alphas_cumprod([0.9, 0.5]), density=float64(1.0, 0.0)),
            "density > 0 everywhere, got 1 zeros",
        ),
        (lambda: check_prediction_type("eps"), "one of epsilon, x0, v, flow, got 'eps'"),
        (lambda: converted(constant(LINEAR), LINEAR, "score", source="epsilon"), "got 'score'"),
        (lambda: converted(constant(LINEAR), LINEAR, "v", source="score"), "got 'score'"),
        (lambda: defined_on("noise"), "one of epsilon, x0, v, flow, got 'noise'"),
    ],
)
def test_a_bad_weighting_says_what_is_wrong(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
