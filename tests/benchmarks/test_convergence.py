"""The convergence benchmark: reading of curves, and stacked training against single training."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule

STEPS = [100, 200, 400, 800, 1600]


def power_law(pace: float = 1.0) -> list[float]:
    """A curve that is straight in log step and log distance, at `pace` times the speed."""
    return [1000 * (pace * step) ** -0.7 for step in STEPS]


def test_a_crossing_of_a_power_law_is_exact_between_evaluations(load: Callable[[str], ModuleType]) -> None:
    crossing = load("crossing")
    for step in (100.0, 137.0, 799.9, 1600.0):
        found = crossing.first_crossing(STEPS, power_law(), 1000 * step**-0.7)
        assert found.bound == crossing.EXACT
        assert found.value == pytest.approx(step, rel=1e-12)


def test_the_first_crossing_counts_of_a_curve_that_rises_again(load: Callable[[str], ModuleType]) -> None:
    found = load("crossing").first_crossing(STEPS, [16.0, 4.0, 9.0, 3.0, 1.0], 8.0)
    # Half way from 16 to 4 in log distance is half way from 100 to 200 in log steps.
    assert found.value == pytest.approx(100 * math.sqrt(2))


def test_a_level_outside_the_curve_gives_a_bound(load: Callable[[str], ModuleType]) -> None:
    crossing = load("crossing")
    curve = power_law()
    assert crossing.first_crossing(STEPS, curve, 100.0) == crossing.Reading(100.0, crossing.AT_MOST)
    assert crossing.first_crossing(STEPS, curve, 1.0) == crossing.Reading(1600.0, crossing.AT_LEAST)
    # A lower bound on the steps is an upper bound on the speed-up.
    slow = [10 * distance for distance in curve]
    assert crossing.speed_up(STEPS, slow, curve, 800) == crossing.Reading(0.5, crossing.AT_MOST)
    assert crossing.speed_up(STEPS, curve, slow, 800) == crossing.Reading(8.0, crossing.AT_LEAST)


def test_samples_that_are_not_finite_have_not_reached_the_level(load: Callable[[str], ModuleType]) -> None:
    crossing = load("crossing")
    assert crossing.first_crossing(STEPS, [math.inf, math.inf, 5, 4, 3], 5.0).value == 400
    assert crossing.first_crossing(STEPS, [math.inf] * 5, 5.0).bound == crossing.AT_LEAST
    # If the baseline's samples are not finite, any curve gets as far from its start.
    assert crossing.first_crossing(STEPS, power_law(), math.inf).bound == crossing.AT_MOST
    assert crossing.speed_up(STEPS, [math.inf] * 5, [math.inf] * 5, 800).bound == crossing.AT_LEAST
    with pytest.raises(ValueError, match="level needs a distance > 0, got nan"):
        crossing.first_crossing(STEPS, power_law(), math.nan)


@pytest.mark.parametrize("horizon", STEPS[2:])
def test_a_curve_run_through_twice_as_fast_is_a_speed_up_of_two(
    load: Callable[[str], ModuleType], horizon: int
) -> None:
    found = load("crossing").speed_up(STEPS, power_law(2.0), power_law(), horizon)
    assert (found.value, found.bound) == (pytest.approx(2), "")


def test_a_horizon_that_is_not_evaluated_is_refused(load: Callable[[str], ModuleType]) -> None:
    with pytest.raises(ValueError, match=r"horizon needs one of the evaluated steps \[100, .* got 300"):
        load("crossing").speed_up(STEPS, power_law(), power_law(), 300)


def test_the_null_band_spans_what_the_baselines_give_each_other(load: Callable[[str], ModuleType]) -> None:
    crossing = load("crossing")
    one = crossing.Reading(pytest.approx(1))
    assert crossing.null_band(STEPS, [power_law()] * 3, 800) == (one, one)
    # One of the two seeds is twice as fast. The ratios are 1/2 and 2, and quantiles are on the line between.
    low, high = crossing.null_band(STEPS, [power_law(), power_law(2.0)], 800)
    assert low == crossing.Reading(pytest.approx(0.5 + 0.05 * 1.5))
    assert high == crossing.Reading(pytest.approx(0.5 + 0.95 * 1.5))
    # The slower seed never reaches the distance that the faster one has at the last step.
    low, high = crossing.null_band(STEPS, [power_law(), power_law(2.0)], 1600)
    assert (low.bound, high.bound) == (crossing.AT_MOST, crossing.EXACT)
    assert crossing.null_band(STEPS, [power_law()], 800) is None


def test_the_bootstrap_interval_is_that_of_a_mean(load: Callable[[str], ModuleType]) -> None:
    crossing = load("crossing")
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 2
    readings = [crossing.Reading(value) for value in values.tolist()]
    found = crossing.summary(readings)
    assert found == crossing.summary(readings), "the same seed draws the same resamples"
    assert found != crossing.summary(readings, seed=1)
    # A mean of 400 values is normal to a percent. A 2.5 % quantile of 10,000 draws is precise to 4 %.
    half_width = 1.96 * float(values.std()) / 20
    assert found.high - found.mean == pytest.approx(half_width, rel=0.06)
    assert found.mean - found.low == pytest.approx(half_width, rel=0.06)


def test_a_mean_says_which_bounds_are_in_it(load: Callable[[str], ModuleType]) -> None:
    crossing = load("crossing")
    most, least = crossing.Reading(0.8, crossing.AT_MOST), crossing.Reading(10.0, crossing.AT_LEAST)
    exact = crossing.Reading(1.0)
    found = crossing.summary([exact])
    assert (found.low, found.mean, found.high, found.bound) == (1, 1, 1, crossing.EXACT)
    assert crossing.summary([exact, most]).bound == crossing.AT_MOST
    assert crossing.summary([exact, least]).bound == crossing.AT_LEAST
    assert crossing.summary([most, least]).bound == crossing.MIXED


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_set(load: Callable[[str], ModuleType], dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 1, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    return load("image_sets").ImageSet(images, torch.arange(40) % 4, 4)


def lone_run(load: Callable[[str], ModuleType], member: Any, data: Any, shape: Any, num_steps: int) -> Any:
    """The losses of an ordinary training loop around an ordinary DiT, and its weights and their averages."""
    training = load("stacked.training")
    process = training.build_process("linear", member.prediction_type)
    policy = build_policy(member.policy, process.schedule, member.prediction_type)
    model = training.first_model(data, shape, member.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=member.lr, weight_decay=0)
    losses, averages = [], {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(num_steps):
        policy.advance(step)
        draw = policy.draw(shape.batch_size, generator=training.timestep_generator(member.seed, step))
        rows, noise = training.draw_batch(data, shape.batch_size, seed=member.seed, step=step)
        noised = process.corrupt(data.images[rows], draw, noise=noise)
        terms = process.loss(model(noised.x_t, noised.timestep, data.labels[rows]), noised, draw)
        optimizer.zero_grad()
        terms.loss.mean().backward()
        optimizer.step()
        policy.update(draw.index, terms.mse.detach())
        losses.append(float(terms.loss.detach().mean()))
        for name, parameter in model.named_parameters():
            averages[name].lerp_(parameter.detach(), 1 - min(0.99, (1 + step) / (10 + step)))
    return losses, dict(model.named_parameters()), averages


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v"])
def test_a_member_of_a_stack_equals_a_lone_run(
    load: Callable[[str], ModuleType], prediction_type: str
) -> None:
    training = load("stacked.training")
    data, shape = small_set(load, torch.float64), training.Shape(width=16, depth=2, num_heads=2, batch_size=6)
    policies = ("uniform", "speedit", {"type": "clts", "curriculum_steps": 4}, "loss_second_moment")
    members = [
        training.Member(policy, seed, prediction_type=prediction_type)
        for policy in policies
        for seed in (0, 3)
    ]
    stack = training.StackedTraining(members, data, "linear", shape)
    losses = torch.stack([stack.train_step() for _ in range(6)], dim=1)  # (M, 6)
    for number, member in enumerate(members):
        lone_losses, weights, averages = lone_run(load, member, data, shape, 6)
        # In float64 a gradient is wrong by at most 1e-16, and Adam divides it by at least its epsilon, 1e-8.
        assert_close(losses[number], torch.tensor(lone_losses), atol=1e-8, rtol=0)
        for name, stacked in stack.parameters.items():
            assert_close(stacked[number], weights[name], atol=1e-8, rtol=0)
            assert_close(stack.averaged_weights(number)[name], averages[name], atol=1e-8, rtol=0)
    assert stack.parameters.keys() == {name for name, p in weights.items() if p.requires_grad}


def test_a_stack_of_models_answers_as_each_of_them(load: Callable[[str], ModuleType]) -> None:
    training = load("stacked.training")
    data, shape = small_set(load), training.Shape(width=16, depth=1, num_heads=2)
    models = [training.build_model(data, shape) for _ in range(3)]
    for model in models:
        for parameter in model.parameters():
            # Some weights start at zero.
            torch.nn.init.normal_(parameter, std=0.3)
        model.pos_embed.data.copy_(models[0].pos_embed)
    x, timestep, label = torch.randn(6, 1, 8, 8), torch.arange(6) * 100, torch.arange(6) % 4
    stacked = load("stacked.dit").stacked(models)(x, timestep, label)
    apart = [models[i](x[2 * i : 2 * i + 2], timestep[2 * i :][:2], label[2 * i :][:2]) for i in range(3)]
    # Float32 sums of up to 64 products in another order. The outputs are about 10.
    assert_close(stacked, torch.cat(apart), atol=1e-4, rtol=0)


def test_label_dropout_cannot_be_stacked(load: Callable[[str], ModuleType]) -> None:
    training = load("stacked.training")
    model = training.build_model(small_set(load), training.Shape(width=16, depth=1, num_heads=2))
    model.y_embedder.dropout_prob = 0.1
    with pytest.raises(ValueError, match=r"stacked needs class_dropout_prob 0, got 0.1"):
        load("stacked.dit").stacked([model])


def test_members_of_a_seed_are_paired(load: Callable[[str], ModuleType]) -> None:
    training = load("stacked.training")
    data, shape = small_set(load), training.Shape(width=16, depth=1, num_heads=2, batch_size=50)
    members = [training.Member(policy, seed) for seed in (0, 1) for policy in ("uniform", "speed")]
    stack = training.StackedTraining(members, data, "linear", shape)
    for stacked in stack.parameters.values():
        assert torch.equal(stacked[0], stacked[1])
    embedder = stack.parameters["t_embedder.mlp.0.weight"]
    assert not torch.equal(embedder[1], embedder[2])
    uniform, speed, other, _ = stack.draw_timesteps()
    # Both draws are quantiles at the same uniform numbers. These numbers are the uniform policy's `time`.
    cumulative = build_policy("speed", NoiseSchedule.linear()).density.cumsum(0)
    assert torch.equal(speed.index, torch.searchsorted(cumulative, uniform.time.double()))
    assert not torch.equal(uniform.index, other.index)


def test_members_with_unlike_rates_are_no_stack(load: Callable[[str], ModuleType]) -> None:
    training = load("stacked.training")
    members = [training.Member("uniform"), training.Member("uniform", lr=1e-3)]
    with pytest.raises(ValueError, match="a stack needs one lr and prediction_type, got .*0.001"):
        training.StackedTraining(members, small_set(load), "linear", training.Shape())
    assert [len(stack) for stack in load("convergence.paired_run").stacks_of(members * 6, 2)] == [3, 3, 3, 3]
