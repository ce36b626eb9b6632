import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import (
    ADAPTIVE,
    PAIRED,
    POLICY_NAMES,
    SCHEDULES,
    build,
    configs,
    every_policy,
    generator,
    schedules,
    teach,
    teach_falling,
)
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies.densities.adaptive import AdaptiveDensity
from speedit_plugins.policies.densities.over_time import uniform
from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.policies.weightings.by_noise_level import constant

LINEAR = NoiseSchedule.linear()
# Slopes along the schedule and bins of log-SNR need a neighbour.
NEED_TWO_TIMESTEPS = [
    n for n in POLICY_NAMES if n.startswith(("spe", "open_sora", "laplace", "cauchy", "edm", "auto"))
]


def assert_same_draw(first: TimestepDraw, second: TimestepDraw) -> None:
    assert torch.equal(first.index, second.index)
    assert torch.equal(first.time, second.time)
    assert torch.equal(first.weight, second.weight)
    assert first.scope == second.scope


@settings(derandomize=True, deadline=None, max_examples=120)
@given(st.data(), schedules(), st.integers(1, 300), st.integers(0, 2**32))
def test_draws_of_every_policy_stay_inside(
    data: st.DataObject, schedule: NoiseSchedule, batch_size: int, seed: int
) -> None:
    T = schedule.num_timesteps
    policy = build(data.draw(configs(T)), schedule)
    policy.advance(data.draw(st.integers(0, 10**6)))
    draw = policy.draw(batch_size, generator=generator(seed))
    for part in (draw.index, draw.time, draw.weight):
        assert part.shape == (batch_size,)
    assert ((draw.index >= 0) & (draw.index < T)).all()
    assert ((draw.time >= 0) & (draw.time <= 1)).all()
    # An index with probability 0 is never drawn.
    assert (policy.density_for(batch_size)[draw.index] > 0).all()
    assert torch.equal(draw.weight, policy.weight.float()[draw.index])


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data(), schedules())
def test_normalize_makes_the_mean_weight_one(data: st.DataObject, schedule: NoiseSchedule) -> None:
    config = data.draw(configs(schedule.num_timesteps))
    plain = build({**config, "normalize": False}, schedule)
    normalised = build({**config, "normalize": True}, schedule)
    assert normalised.mean_weight == pytest.approx(1.0, abs=1e-12)
    assert_close(normalised.weight * plain.mean_weight, plain.weight, rtol=1e-12, atol=0)


def test_nothing_is_normalised_unasked() -> None:
    assert build_policy("speedit", LINEAR).mean_weight == pytest.approx(0.5815, abs=5e-5)


def test_normalize_follows_a_learning_policy() -> None:
    policy = build_policy(
        {"density": "loss_second_moment", "weighting": "p2", "normalize": True}, NoiseSchedule.cosine(5)
    )
    assert policy.mean_weight == pytest.approx(1.0)
    teach(policy, torch.arange(1.0, 6.0))
    assert policy.mean_weight == pytest.approx(1.0)


# Randomness


def test_a_generator_reproduces_every_draw() -> None:
    for policy in every_policy(LINEAR):
        assert_same_draw(policy.draw(33, generator=generator(5)), policy.draw(33, generator=generator(5)))
        assert not torch.equal(
            policy.draw(33, generator=generator(5)).time, policy.draw(33, generator=generator(6)).time
        )


def test_a_generator_leaves_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    for policy in every_policy(LINEAR):
        policy.draw(16, generator=generator(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_generator_the_global_seed_decides() -> None:
    policy = build_policy("speedit", LINEAR)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = policy.draw(16)
        torch.manual_seed(3)
        assert_same_draw(first, policy.draw(16))


def test_default_dtype_changes_nothing() -> None:
    def tables_and_draw(name: str) -> tuple[Tensor, Tensor, TimestepDraw]:
        policy = build(name, NoiseSchedule.cosine(97))
        return policy.density, policy.weight, policy.draw(64, generator=generator(1))

    expected = [tables_and_draw(name) for name in POLICY_NAMES]
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = [tables_and_draw(name) for name in POLICY_NAMES]
    finally:
        torch.set_default_dtype(torch.float32)
    for (density, weight, draw), (other_density, other_weight, other_draw) in zip(
        expected, found, strict=True
    ):
        assert torch.equal(density, other_density)
        assert torch.equal(weight, other_weight)
        assert_same_draw(draw, other_draw)


def test_autocast_changes_nothing() -> None:
    policy = build_policy("speedit", LINEAR)
    expected = policy.draw(64, generator=generator(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_draw(build_policy("speedit", LINEAR).draw(64, generator=generator(1)), expected)


@pytest.mark.parametrize(("device", "on"), [("meta", "cpu"), ("cuda", "cpu")])
def test_a_generator_of_another_device_is_refused(device: str, on: str) -> None:
    policy = build_policy("uniform", LINEAR)
    with pytest.raises(ValueError, match=f"draw on {device} needs a generator on {device}, got one on {on}"):
        policy.draw(4, device=device, generator=torch.Generator(on))


# Learning and curriculum


def test_tables_on_the_device_follow_what_was_learned() -> None:
    policy = build_policy("loss_second_moment", NoiseSchedule.cosine(3))
    policy.draw(4)
    teach(policy, torch.tensor([0.0, 1.0, 0.0]))
    draw = policy.draw(1000, generator=generator(0))
    # Index 1 has 99.9 % of the mass, and the weight 1 / (3 p).
    assert float((draw.index == 1).float().mean()) > 0.98
    assert_close(draw.weight, policy.weight.float()[draw.index])


def test_tables_on_the_device_follow_the_curriculum() -> None:
    policy = build_policy({"type": "clts", "std": 0.01, "curriculum_steps": 1}, LINEAR)
    assert int(policy.draw(1000, generator=generator(0)).index.max()) > 900
    policy.advance(1)
    drawn = policy.draw(1000, generator=generator(0)).index
    # The standard deviation is ten indices. The limits are ten of them from 300.
    assert ((drawn > 200) & (drawn < 400)).all()


def test_policies_that_do_not_learn_ignore_updates() -> None:
    for name in POLICY_NAMES:
        if name in ADAPTIVE:
            continue
        policy = build(name, LINEAR)
        before = policy.density.clone()
        policy.update(torch.tensor([1]), torch.tensor([1.0]))
        policy.advance(1000)
        assert torch.equal(policy.density, before)


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_state_round_trip_through_a_file(name: str, tmp_path: Any) -> None:
    schedule = NoiseSchedule.cosine(6)
    trained, fresh = build(name, schedule), build(name, schedule)
    teach(trained, torch.arange(1.0, 7.0))
    trained.advance(20_000)
    torch.save(trained.state_dict(), tmp_path / "state.pt")
    # The file has plain values and tensors only, so weights_only=True reads it.
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.density, trained.density)
    assert torch.equal(fresh.weight, trained.weight)
    trained.update(torch.tensor([0, 5]), torch.tensor([2.0, 9.0]))
    fresh.update(torch.tensor([0, 5]), torch.tensor([2.0, 9.0]))
    assert torch.equal(fresh.density, trained.density)
    assert_same_draw(fresh.draw(32, generator=generator(0)), trained.draw(32, generator=generator(0)))


def test_a_saved_state_does_not_change_with_later_training() -> None:
    policy = build_policy("loss_second_moment", NoiseSchedule.cosine(2))
    state = policy.state_dict()
    teach(policy, torch.tensor([1.0, 2.0]))
    assert int(state["density"]["counts"].sum()) == 0


def test_a_state_of_another_policy_is_refused() -> None:
    state = build_policy("uniform", LINEAR).state_dict()
    with pytest.raises(ValueError, match="needs policy 'p2' with T = 1000, got 'uniform' with T = 1000"):
        build_policy("p2", LINEAR).load_state_dict(state)
    with pytest.raises(ValueError, match="needs policy 'uniform' with T = 20, got 'uniform' with T = 1000"):
        build_policy("uniform", NoiseSchedule.linear(20)).load_state_dict(state)
    longer = build_policy({"type": "loss_second_moment", "history": 3}, LINEAR).state_dict()
    with pytest.raises(ValueError, match=r"loss history needs shape \(1000, 10\), got \(1000, 3\)"):
        build_policy("loss_second_moment", LINEAR).load_state_dict(longer)


def test_an_adaptive_density_need_not_adapt_to_both() -> None:
    class Still(AdaptiveDensity):
        def density(self) -> Any:
            return uniform(LINEAR)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            assert state == {}

    policy = TimestepPolicy(LINEAR, Still(), lambda density: constant(LINEAR))
    tables = policy.density
    policy.update(torch.tensor([1]), torch.tensor([1.0]))
    policy.advance(5)
    assert policy.density is tables


# Copies


@pytest.mark.parametrize("name", POLICY_NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])  # noqa: S301 (own bytes)
def test_copies_draw_alike_and_learn_apart(name: str, duplicate: Any) -> None:
    policy = build({"type": name, "normalize": True}, NoiseSchedule.cosine(6))
    policy.draw(4)
    other = duplicate(policy)
    assert_same_draw(policy.draw(32, generator=generator(0)), other.draw(32, generator=generator(0)))
    before = policy.density.clone()
    teach_falling(other, torch.arange(1.0, 7.0))
    other.advance(30_000)
    assert torch.equal(policy.density, before)
    assert torch.equal(other.density, before) == (name not in ADAPTIVE or name == "auto")


# What a policy says of itself


@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        ("uniform", None),
        ("speedit", 642),
        ("speedit_reference", 642),
        ("speed", 700),
        ("speed_reference", 700),
        ("open_sora_speed", 642),
        ("p2", None),
        ("min_snr", None),
        ("logit_normal", None),
        ("clts", None),
        ("loss_second_moment", None),
    ],
)
def test_boundary_of_each_policy_on_linear(name: str, boundary: int | None) -> None:
    assert build_policy(name, LINEAR).boundary_index == boundary


def test_a_policy_prints_its_name_boundary_and_mean_weight() -> None:
    assert str(build_policy("speed", LINEAR)) == "speed: boundary 700 of 1000 timesteps, mean weight 0.4965"
    assert (
        str(build_policy({"type": "uniform", "shift": 3}, NoiseSchedule.rectified_flow(1000)))
        == "uniform with shift 3: nine in ten draws at u = 0.14 to 0.98, mean weight 1.0000"
    )


def test_only_importance_samplers_weigh_the_whole_loss() -> None:
    for name in POLICY_NAMES:
        policy = build(name, LINEAR)
        assert policy.scope == ("loss" if name in ("loss_second_moment", "loss_balanced") else "mse")
        assert policy.draw(2).scope == policy.scope


def test_mean_weight_is_the_mean_of_drawn_weights() -> None:
    policy = build_policy("speedit", LINEAR)
    weight = policy.draw(200_000, generator=generator(0)).weight.double()
    # Five standard errors. The weights are in [0, 1], so their standard deviation is at most 1/2.
    assert float(weight.mean()) == pytest.approx(policy.mean_weight, abs=5 * 0.5 / 200_000**0.5)


def test_one_timestep_is_a_schedule_too() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in set(POLICY_NAMES) - set(NEED_TWO_TIMESTEPS):
            assert build_policy(name, schedule).draw(3).index.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", NEED_TWO_TIMESTEPS)
def test_one_timestep_has_no_neighbour(name: str) -> None:
    with pytest.raises(ValueError, match="needs T >= 2, got T = 1"):
        build(name, NoiseSchedule.from_alphas_cumprod([0.5]))


# Errors


@pytest.mark.parametrize("name", PAIRED)
def test_a_paired_draw_cannot_be_stratified(name: str) -> None:
    with pytest.raises(ValueError, match="paired draws cannot be stratified"):
        build_policy({"type": name, "stratified": True}, LINEAR)


@pytest.mark.parametrize("scale", [1e-50, 1e50])
def test_normalize_makes_weights_of_any_size_usable(scale: float) -> None:
    policy = TimestepPolicy(LINEAR, uniform(LINEAR), lambda density: scale * constant(LINEAR), normalize=True)
    assert_close(policy.draw(4).weight, torch.ones(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build_policy("uniform", LINEAR).draw(0), "draw needs batch_size >= 1, got 0"),
        (lambda: build_policy("uniform", LINEAR).density_for(0), "density_for needs batch_size >= 1, got 0"),
        (
            lambda: TimestepPolicy(
                LINEAR, uniform(NoiseSchedule.cosine(9)), lambda density: constant(LINEAR)
            ),
            r"density and weight need shape \(1000,\), got \[\(9,\), \(1000,\)\]",
        ),
        (
            lambda: TimestepPolicy(LINEAR, uniform(LINEAR), lambda density: -constant(LINEAR), name="mine"),
            "policy 'mine' needs weights >= 0 that are finite in float32, got -1 to -1",
        ),
        (
            lambda: TimestepPolicy(LINEAR, uniform(LINEAR), lambda density: constant(LINEAR) * float("nan")),
            "that are finite in float32",
        ),
        (
            lambda: TimestepPolicy(
                LINEAR, uniform(LINEAR), lambda density: constant(LINEAR) * 0, normalize=True
            ),
            "needs a weight > 0 in float32 at some timestep that it draws, got at most 0: nothing would be",
        ),
        # float64 tables that float32 draws would turn into inf, or into 0.
        (
            lambda: build_policy({"type": "p2", "k": 1e-300}, NoiseSchedule.from_alphas_cumprod([0.5, 0.0])),
            "that are finite in float32, got 1 to 1e\\+300",
        ),
        (lambda: build_policy({"type": "p2", "k": 1e50}, LINEAR), "got at most 1e-50: nothing"),
        (lambda: build_policy({"type": "p2", "gamma": float("inf")}, LINEAR), "got at most 0: nothing"),
        (
            lambda: TimestepPolicy(
                LINEAR,
                uniform(LINEAR),
                lambda density: constant(LINEAR),
                scope="all",  # type: ignore[arg-type]  # the wrong value is what is tested
            ),
            "scope needs 'mse' or 'loss', got 'all'",
        ),
    ],
)
def test_a_bad_policy_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_every_named_policy_builds_on_every_schedule(schedule: Any) -> None:
    for name in POLICY_NAMES:
        policy = build(name, schedule())
        assert float(policy.density.sum()) == pytest.approx(1.0, abs=1e-12)
        assert policy.name == name
