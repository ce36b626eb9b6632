"""Laws and weights that follow the losses: the known law for known losses, and nothing lost on a resume."""

import copy
import math
from typing import Any

import pytest
import torch
from policy_cases import zero_terminal
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies.densities.learned import InfoNoise, LossBalanced, over_log_snr
from speedit_plugins.policies.densities.progress import LearningProgress
from speedit_plugins.policies.weightings.learned import Uncertainty

LINEAR, FLOW = NoiseSchedule.linear(), NoiseSchedule.rectified_flow(1000)
LEARNED = ("loss_balanced", "info_noise", "adaptive", "uncertainty")
VARIANCE = 0.25
# Share of the draws in which a law may differ from the one expected. A bin's mean is off by 0.9 %, which is
# 0.29 / sqrt(1024), or by a few times that with few draws. Bins of 0.76 in log-SNR read up to 2.4 % too high.
TOLERANCE = 0.02


def epsilon_error(schedule: NoiseSchedule) -> Tensor:
    """Squared error (T,) of the best prediction of epsilon for Gaussian data: SNR s / (1 + SNR s)."""
    return schedule.snr * VARIANCE / (1 + schedule.snr * VARIANCE)


def expected_loss(schedule: NoiseSchedule, prediction_type: str) -> Tensor:
    """Squared error (T,) of the best prediction of x_0 + c eps for Gaussian data, by its definition.

    The posterior variance of x_0 is s / (1 + SNR s). Given x_t, an error e of x_0 is one of -alpha / sigma e
    in epsilon, so one of a multiple of e in any target that is linear in both.
    """
    alpha, sigma = schedule.alpha, schedule.sigma
    in_data, in_noise = {
        "x0": (torch.ones_like(alpha), torch.zeros_like(alpha)),
        "epsilon": (torch.zeros_like(alpha), torch.ones_like(alpha)),
        "v": (-sigma, alpha),  # on a variance-preserving schedule
        "flow": (-torch.ones_like(alpha), torch.ones_like(alpha)),  # on the straight path
    }[prediction_type]
    posterior = VARIANCE / (1 + schedule.snr * VARIANCE)
    return (in_data - in_noise * alpha / sigma) ** 2 * posterior


def trained(
    config: str | dict[str, Any],
    schedule: NoiseSchedule,
    prediction_type: str,
    loss: Tensor,
    *,
    num_steps: int = 400,
    seed: int = 0,
) -> TimestepPolicy:
    """The policy after steps of 256 own draws whose losses have the mean `loss` (T,)."""
    policy, generator = build_policy(config, schedule, prediction_type), torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        step(policy, loss, generator)
    return policy


def step(policy: TimestepPolicy, loss: Tensor, generator: torch.Generator) -> Tensor:
    """One training step of 256 draws. The losses are spread evenly from half to three halves of `loss`."""
    policy.advance()
    index = policy.draw(256, generator=generator).index
    policy.update(index, loss[index] * (0.5 + torch.rand(256, generator=generator, dtype=torch.float64)))
    return index


def distance(law: Tensor, other: Tensor) -> float:
    """Share of the draws in which two laws (T,) differ, in [0, 1]."""
    return float((law / law.sum() - other / other.sum()).abs().sum() / 2)


def learned_part(policy: TimestepPolicy, floor: float) -> Tensor:
    """The policy's density (T,) without its uniform share."""
    return (policy.density - floor / len(policy.density)) / (1 - floor)


def info_noise(**options: Any) -> dict[str, Any]:
    return {"type": "info_noise", "warmup_losses": 0, "uniform_floor": 0.1, **options}


# InfoNoise


@pytest.mark.parametrize(
    ("schedule", "prediction_type"),
    [(LINEAR, "epsilon"), (LINEAR, "x0"), (LINEAR, "v"), (FLOW, "flow"), (FLOW, "x0"), (FLOW, "epsilon")],
    ids=str,
)
def test_info_noise_follows_half_the_error_of_epsilon(schedule: NoiseSchedule, prediction_type: str) -> None:
    loss = expected_loss(schedule, prediction_type)
    policy = trained(info_noise(gate=0.0), schedule, prediction_type, loss)
    # Sums over timesteps of rate * |d log-SNR|, each from its own slope. The two end timesteps have half of
    # theirs, a few thousandths of the draws.
    rate = epsilon_error(schedule) / 2 * schedule.gradient(schedule.log_snr).abs()
    found = learned_part(policy, 0.1)
    assert distance(found[1:-1], rate[1:-1]) < TOLERANCE


def test_the_gate_halves_the_draws_where_it_says() -> None:
    loss = expected_loss(LINEAR, "epsilon")
    ratio = LINEAR.sigma / LINEAR.alpha
    gated = learned_part(trained(info_noise(gate=0.5), LINEAR, "epsilon", loss), 0.1)
    rate = over_log_snr(LINEAR, epsilon_error(LINEAR) * ratio**3 / (ratio**3 + 0.5**3))
    assert distance(gated, rate) < TOLERANCE


def test_the_gate_of_the_onset_rule() -> None:
    # Twelve timesteps per unit of log-SNR, from EDM's cleanest ratio of 0.002 on.
    ratio = torch.exp(torch.linspace(math.log(0.002), math.log(80.0), 250, dtype=torch.float64))
    schedule = NoiseSchedule.from_alphas_cumprod(1 / (1 + ratio**2))
    policy = trained(info_noise(), schedule, "epsilon", epsilon_error(schedule))
    # rate / ratio falls with the ratio, from 1/2 / 0.002 = 250 on. It is 0.002 of that where
    # SNR s / (1 + SNR s) equals the ratio: r^3 + s r - s = 0 with s = 1/4, so r = 0.5.
    expected = over_log_snr(schedule, epsilon_error(schedule) * ratio**3 / (ratio**3 + 0.5**3))
    # The pivot is one of the timesteps, which are 4 % apart, so the gate may be off by 3 * 4 % of its half.
    assert distance(learned_part(policy, 0.1), expected) < TOLERANCE + 0.03


@pytest.mark.parametrize(
    ("schedule", "prediction_type", "weight"),
    [
        (LINEAR, "epsilon", LINEAR.snr),
        (LINEAR, "v", LINEAR.snr + 1),
        (LINEAR, "x0", torch.ones_like(LINEAR.snr)),
        (FLOW, "flow", 1 / FLOW.sigma**2),
    ],
    ids=["epsilon", "v", "x0", "flow"],
)
def test_draws_times_the_weight_on_x0_can_follow_the_rate(
    schedule: NoiseSchedule, prediction_type: str, weight: Tensor
) -> None:
    loss = expected_loss(schedule, prediction_type)
    policy = trained(info_noise(gate=0.0, divide_by_weight=True), schedule, prediction_type, loss)
    expected = over_log_snr(schedule, epsilon_error(schedule) / weight)
    assert distance(learned_part(policy, 0.1), expected) < TOLERANCE


def test_the_learned_law_takes_over_during_the_warm_up() -> None:
    loss, uniform = expected_loss(LINEAR, "epsilon"), torch.full((1000,), 1e-3, dtype=torch.float64)
    config = info_noise(warmup_losses=100 * 256, uniform_floor=0.2)
    # Halfway through the warm-up, half of 80 % follow the law.
    half, whole, long = (trained(config, LINEAR, "epsilon", loss, num_steps=n) for n in (48, 104, 400))
    distances = [distance(policy.density, uniform) for policy in (half, whole, long)]
    assert distances[0] == pytest.approx(0.48 * distances[2], abs=0.02)
    assert distances[1] == pytest.approx(distances[2], abs=0.02)
    assert float(long.density.min()) >= 0.2 / 1000


# VDM++


def test_loss_balanced_follows_the_loss_and_keeps_the_objective() -> None:
    loss = 0.1 + expected_loss(FLOW, "flow")
    config = {"type": "loss_balanced", "uniform_floor": 0.1}
    policy = trained(config, FLOW, "flow", loss)
    assert distance(learned_part(policy, 0.1), loss) < TOLERANCE
    # Sum p w L = sum L / T: the objective is that of uniform draws, whatever has been learned.
    assert_close((policy.density * policy.weight * loss).sum(), loss.mean())
    assert policy.scope == "loss"


def test_balanced_over_log_snr() -> None:
    loss = 0.1 + expected_loss(LINEAR, "epsilon")
    policy = trained(
        {"type": "loss_balanced", "over": "log_snr", "uniform_floor": 0.1}, LINEAR, "epsilon", loss
    )
    expected = loss * LINEAR.gradient(LINEAR.log_snr).abs()
    assert distance(learned_part(policy, 0.1)[1:-1], expected[1:-1]) < TOLERANCE


# Learning progress


def test_adaptive_draws_where_the_loss_falls() -> None:
    policy, generator = build_policy("adaptive", LINEAR, "epsilon"), torch.Generator().manual_seed(0)
    falls = LINEAR.log_snr.abs() < 2
    before = float(policy.density[falls].sum())
    for number in range(400):
        step(policy, torch.where(falls, 0.2 + math.exp(-number / 200), 0.5).double(), generator)
    at_work = float(policy.density[falls].sum())
    # All bins that fall have the preference near 1 and the others one near -1, in the limit: e^2 : 1.
    assert before * 1.3 < at_work < before * math.e**2
    for _ in range(3000):
        step(policy, torch.full((1000,), 0.5, dtype=torch.float64), generator)
    # Now the rewards are noise in [-1, 1]. Their mean over 10 rounds has a standard deviation of 0.2 or less.
    assert float(policy.density[falls].sum()) == pytest.approx(before, rel=0.2)
    ratio = policy.density.max() / policy.density.min()
    assert float(ratio) < math.exp(2 * 4 * 0.2)


def test_adaptive_takes_the_drop_of_the_bound_not_of_the_loss() -> None:
    # x0's loss falls alike at all noise levels. In epsilon, and so in the bound, it is SNR times as much.
    policy, generator = build_policy("adaptive", LINEAR, "x0"), torch.Generator().manual_seed(0)
    for number in range(400):
        step(policy, torch.full((1000,), 0.1 + math.exp(-number / 200), dtype=torch.float64), generator)
    clean, noisy = LINEAR.log_snr > 3, LINEAR.log_snr < -3
    assert float(policy.density[clean].mean()) > 1.5 * float(policy.density[noisy].mean())


# Uncertainty


def test_uncertainty_makes_every_noise_level_count_alike() -> None:
    loss = 0.02 + expected_loss(FLOW, "flow")
    policy = trained("uncertainty", FLOW, "flow", loss)
    assert_close(policy.density, torch.full((1000,), 1e-3, dtype=torch.float64))
    seen = FLOW.log_snr.abs() < 8  # bins beyond have had a few losses only
    # Four standard deviations of the running mean, and the width of a bin.
    assert_close((policy.weight * loss)[seen], torch.ones(int(seen.sum())).double(), rtol=0.07, atol=0)
    assert float((policy.density * policy.weight * loss).sum()) == pytest.approx(1.0, abs=0.02)


def test_the_weights_are_the_minimum_of_the_papers_loss() -> None:
    # L / e^u + u has its minimum over u at the mean of L. No step of 5 % from the learned u lowers it.
    loss = 0.02 + expected_loss(FLOW, "flow")
    u = -trained("uncertainty", FLOW, "flow", loss, num_steps=1000).weight.log()
    seen = FLOW.log_snr.abs() < 8

    def objective(log_variance: Tensor) -> Tensor:
        return (loss / log_variance.exp() + log_variance)[seen]

    for change in (-0.05, 0.05):
        assert float(objective(u + change).mean()) > float(objective(u).mean())


def test_uncertainty_is_finite_at_zero_terminal_snr_and_bounded() -> None:
    schedule = zero_terminal(NoiseSchedule.scaled_linear())
    policy = trained("uncertainty", schedule, "epsilon", epsilon_error(schedule))
    assert torch.isfinite(policy.weight).all()
    assert float(policy.weight.max() / policy.weight.min()) == pytest.approx(1000.0)
    # A law over log-SNR gives the timestep without one 1 / T.
    policy = trained(info_noise(), schedule, "epsilon", epsilon_error(schedule))
    assert float(policy.density[-1]) == pytest.approx(1e-3)


def test_weights_learned_for_any_density_and_prediction_type() -> None:
    weighted = {"type": "logit_normal", "weighting": "uncertainty", "normalize": True}
    losses = {kind: 0.01 + expected_loss(LINEAR, kind) for kind in ("epsilon", "v")}
    policies = {kind: trained(weighted, LINEAR, kind, loss) for kind, loss in losses.items()}
    for policy in policies.values():
        assert policy.mean_weight == pytest.approx(1.0)
        assert policy.learns
    # w L has the same shape for both: that of 1.
    products = [policies[kind].weight * losses[kind] for kind in losses]
    inner = policies["v"].density > 1e-4
    assert distance(products[0][inner], products[1][inner]) < TOLERANCE
    tables = policies["v"].draw(64, generator=torch.Generator().manual_seed(0))
    assert_close(tables.weight, policies["v"].weight.float()[tables.index])


# All of them


@pytest.mark.parametrize("name", LEARNED)
def test_a_resumed_run_draws_the_same_bit_for_bit(name: str) -> None:
    loss = 0.1 + expected_loss(FLOW, "flow")
    config = {"type": name, "stratified": True}
    # 131 updates: between two refreshes, and between two rounds of `adaptive`.
    policy = trained(config, FLOW, "flow", loss, num_steps=131)
    resumed = build_policy(config, FLOW, "flow")
    resumed.load_state_dict(copy.deepcopy(policy.state_dict()))
    draws = []
    for each in (policy, resumed):
        generator = torch.Generator().manual_seed(1)
        draws.append(torch.cat([step(each, loss, generator) for _ in range(60)]))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(policy.density, resumed.density)
    assert torch.equal(policy.weight, resumed.weight)


@pytest.mark.parametrize("name", LEARNED)
def test_broken_losses_change_little_and_bad_ones_nothing(name: str) -> None:
    loss = 0.1 + expected_loss(FLOW, "flow")
    clean, broken = (build_policy(name, FLOW, "flow") for _ in range(2))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    uniform = torch.Generator().manual_seed(1)
    for _ in range(200):
        index = torch.randint(1000, (256,), generator=uniform)
        for policy, generator in zip((clean, broken), generators, strict=True):
            noisy = loss[index] * (0.5 + torch.rand(256, generator=generator, dtype=torch.float64))
            if policy is broken:
                noisy = torch.cat([noisy, torch.tensor([math.nan, math.inf, -math.inf]).double()])
            policy.update(torch.cat([index, index[:3]])[: len(noisy)], noisy)
    # Losses that are not finite are not there.
    assert torch.equal(clean.density, broken.density)
    assert torch.equal(clean.weight, broken.weight)
    for number in range(80):
        index = torch.randint(1000, (256,), generator=uniform)
        noisy = loss[index]
        clean.update(index, noisy)
        # One loss of each batch is huge, and one whole batch of eighty.
        noisy = torch.where(torch.arange(256) == 7, 1e30, noisy) if number != 40 else noisy * 1e30
        broken.update(index, noisy)
    # A huge loss in one block of 32 counts as ten, so means are at most 9 / 8 / 4 too high on average. The
    # huge batch adds at most 9 of 64 shares to one block of each bin, for a time.
    assert distance(broken.density, clean.density) < 0.2
    assert (broken.weight / clean.weight).log().abs().max() < 1.0


@pytest.mark.parametrize("name", LEARNED)
def test_short_schedules_learn_too(name: str) -> None:
    for schedule in (
        NoiseSchedule.from_alphas_cumprod([0.5]),
        NoiseSchedule.from_alphas_cumprod([0.5, 0.0]),
        NoiseSchedule.rectified_flow(2),
    ):
        loss = torch.linspace(1.0, 2.0, schedule.num_timesteps, dtype=torch.float64)
        policy = trained(name, schedule, "x0", loss, num_steps=90)
        assert float(policy.density.sum()) == pytest.approx(1.0)
        assert (policy.density > 0).all()


def test_without_a_prediction_type_the_usual_one_is_taken() -> None:
    for schedule, kind in ((LINEAR, "epsilon"), (FLOW, "flow")):
        loss = expected_loss(schedule, kind)
        given = trained(info_noise(), schedule, kind, loss, num_steps=40)
        usual = build_policy(info_noise(), schedule)
        usual.load_state_dict(given.state_dict())
        for policy in (given, usual):
            step(policy, loss, torch.Generator().manual_seed(0))
        assert torch.equal(usual.density, given.density)
    neither = NoiseSchedule(
        LINEAR.alpha, 2 * LINEAR.sigma, timesteps=LINEAR.timesteps, num_original=LINEAR.num_original
    )
    with pytest.raises(ValueError, match="neither variance-preserving nor a rectified flow: wanted one of"):
        build_policy("info_noise", neither)
    assert not build_policy("loss_balanced", neither).density.isnan().any()


def test_states_from_before_weights_could_learn_still_load() -> None:
    state = build_policy("p2", LINEAR).state_dict()
    assert "weighting" not in state
    build_policy("p2", LINEAR).load_state_dict(state)
    with pytest.raises(ValueError, match=r"keys of only one of them: \['weighting'\]"):
        build_policy("uncertainty", LINEAR).load_state_dict({**state, "name": "uncertainty"})
    short = {**build_policy("uncertainty", NoiseSchedule.linear(20)).state_dict(), "num_timesteps": 1000}
    with pytest.raises(ValueError, match=r"a learned table needs shape \(1000,\), got \(20,\)"):
        build_policy("uncertainty", LINEAR).load_state_dict(short)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossBalanced(LINEAR, uniform_floor=0.0), r"uniform_floor in \(0, 1\] .* got 0.0 and 5000"),
        (lambda: LossBalanced(LINEAR, warmup_losses=-1), "warmup_losses >= 0"),
        (lambda: LossBalanced(LINEAR, over="u"), "over='time' or 'log_snr', got 'u'"),  # type: ignore[arg-type]  # the error
        (lambda: InfoNoise(LINEAR, gate=-1.0), "info_noise needs gate >= 0, .* got -1.0, 3.0 and 0.002"),
        (lambda: InfoNoise(LINEAR, gate_power=0.0), "gate_power > 0"),
        (lambda: InfoNoise(LINEAR, onset=1.0), r"onset in \(0, 1\)"),
        (lambda: InfoNoise(LINEAR, "noise"), "prediction_type needs one of epsilon, x0, v, flow"),
        (lambda: LearningProgress(LINEAR, round_updates=0), "adaptive needs round_updates >= 1, .* got 0,"),
        (lambda: LearningProgress(LINEAR, rate=0.0), r"rate in \(0, 1\]"),
        (lambda: LearningProgress(LINEAR, strength=-1.0), "strength >= 0"),
        (lambda: Uncertainty(LINEAR, max_ratio=0.5), "max_ratio >= 1, got 0.5"),
        (lambda: Uncertainty(LINEAR, refresh_updates=0), "refresh_updates >= 1, got 0"),
    ],
)
def test_a_bad_learned_part_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
