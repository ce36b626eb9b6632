"""Shifts and windows of any law."""

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.transforms import shifted

FLOW = NoiseSchedule.rectified_flow(1000)
LINEAR = NoiseSchedule.linear(1000)


def density(config: dict[str, Any], schedule: NoiseSchedule = FLOW) -> torch.Tensor:
    return build_policy(config, schedule).density


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Total variation between two tables."""
    return float((first - second).abs().sum()) / 2


@given(shift=st.floats(0.1, 20.0), mean=st.floats(-1.5, 1.5), std=st.floats(0.3, 2.0))
def test_a_shifted_logit_normal_is_one_with_another_mean(shift: float, mean: float, std: float) -> None:
    # logit(s u / (1 + (s - 1) u)) = logit(u) + ln s
    law = {"type": "logit_normal", "mean": mean, "std": std}
    closed = density({**law, "mean": mean + math.log(shift)})
    # At the ends of [0, 1] a bin of the table is wide in logit(u).
    assert distance(density({**law, "shift": shift}), closed) < 0.01


def test_a_shift_moves_log_snr_on_every_schedule() -> None:
    law = {"density": {"type": "log_snr_normal", "mean": 1.0}, "weighting": "constant"}
    moved = {"density": {"type": "log_snr_normal", "mean": 1.0 - 2 * math.log(2)}, "weighting": "constant"}
    for schedule in (FLOW, LINEAR, NoiseSchedule.cosine(300), NoiseSchedule.linear(1000).zero_terminal_snr()):
        assert distance(density({**law, "shift": 2}, schedule), density(moved, schedule)) < 0.01


def test_a_shift_of_uniform_draws_has_its_closed_form() -> None:
    # P(u <= x) = x / (s - (s - 1) x), so this share of the draws is past t = 0.923: METHOD's 0.20 for s = 3.
    moved = density({"type": "uniform", "shift": 3})
    x = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(moved.cumsum(0), x / (3 - 2 * x), atol=1e-9)
    assert float(moved[923:].sum()) == pytest.approx(0.200, abs=0.001)


@given(first=st.floats(0.2, 5.0), second=st.floats(0.2, 5.0))
def test_shifts_multiply(first: float, second: float) -> None:
    table = density({"type": "logit_normal"})
    twice = shifted(shifted(table, first, FLOW), second, FLOW)
    assert distance(twice, shifted(table, first * second, FLOW)) < 0.01
    assert distance(shifted(twice, 1 / (first * second), FLOW), table) < 0.02


def test_a_shift_moves_the_boundary_of_speed() -> None:
    # lambda_b = -4.963 - 2 ln s: of thinned and then shifted draws, what lies past it is k times rarer.
    policy = build_policy({"type": "speed", "shift": 3}, FLOW)
    ratio = policy.density / density({"type": "uniform", "shift": 3})
    past = FLOW.log_snr < math.log(1 / 143) - 2 * math.log(3)
    assert 0 < int(past.sum()) < 100
    assert torch.allclose(ratio[~past][:-1] / ratio[past][-1], torch.tensor(5.0).double(), rtol=1e-6)


def test_a_window_cuts_and_keeps_the_shape() -> None:
    law, cut = density({"type": "logit_normal"}), density({"type": "logit_normal", "window": [0.25, 0.5]})
    assert not cut[:250].any()
    assert not cut[500:].any()
    assert torch.allclose(cut[250:500], law[250:500] / law[250:500].sum())
    # A bound inside a timestep keeps that part of it; the shift comes before the window.
    halves = build_policy({"type": "uniform", "window": [0.125, 1]}, NoiseSchedule.rectified_flow(4))
    assert halves.density.tolist() == pytest.approx([1 / 7, 2 / 7, 2 / 7, 2 / 7])
    both = density({"type": "uniform", "window": [0.5, 1], "shift": 3})
    moved = density({"type": "uniform", "shift": 3})
    assert torch.allclose(both[500:], moved[500:] / moved[500:].sum())


def test_a_window_moves_over_the_steps_and_is_resumed() -> None:
    config = {"type": "uniform", "window": {"start": [0.8, 1], "low": 0.0, "steps": 10}}
    policy, resumed = (build_policy(config, FLOW) for _ in range(2))
    assert int(policy.density.count_nonzero()) == 200
    policy.advance(5)
    assert int(policy.density.count_nonzero()) == 600
    resumed.load_state_dict(policy.state_dict())
    assert torch.equal(resumed.density, policy.density)
    policy.advance(25)
    assert int(policy.density.count_nonzero()) == 1000


@pytest.mark.parametrize(
    ("rule", "shape", "wanted"),
    [
        ({"type": "flux"}, (16, 32, 32), math.exp(0.5)),
        ({"type": "flux"}, (16, 128, 128), math.exp(1.15)),
        ({"type": "flux"}, (4096, 64), math.exp(1.15)),
        ({"type": "flux", "frames": "second"}, (16, 9, 32, 32), 3 * math.exp(0.5)),
        ({"type": "pixels", "base": 1024, "frames": "first"}, (9, 4, 32, 32), 3.0),
        ({"type": "pixels", "base": 1024}, (4, 9, 64, 64), 2.0),
        ({"type": "linear", "frames": "second"}, (16, 4, 128, 128), 6.0),
        ({"type": "pixels", "base": 1024}, (4, 64, 64), 2.0),
        ({"type": "dimension"}, (768, 16, 16), math.sqrt(48)),
    ],
)
def test_a_shift_follows_the_size_of_each_batch(
    rule: dict[str, Any], shape: tuple[int, ...], wanted: float
) -> None:
    policy = build_policy({"type": "logit_normal", "shift": rule}, FLOW)
    assert policy.needs_data
    policy.observe(torch.zeros(2, *shape))
    assert torch.equal(policy.density, density({"type": "logit_normal", "shift": wanted}))
    smaller = (*shape[:-1], shape[-1] // 2) if len(shape) > 2 else (shape[0] // 2, shape[1])
    policy.observe(torch.zeros(2, *smaller))
    assert not torch.equal(policy.density, density({"type": "logit_normal", "shift": wanted}))


def test_a_policy_that_needs_data_does_not_draw_without() -> None:
    policy = build_policy({"type": "uniform", "shift": "flux"}, FLOW)
    with pytest.raises(ValueError, match="'uniform with shift flux' depends on the data"):
        policy.draw(4)
    policy.observe(torch.zeros(1, 16, 32, 32))
    assert len(policy.draw(4).index) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shift": 0}, "shift needs a finite number > 0, got 0"),
        ({"shift": True}, "shift needs float, got True"),
        ({"shift": "fluxx"}, "unknown shift by resolution 'fluxx'; did you mean 'flux'"),
        ({"shift": {"type": "flux", "base_tokens": 5000}}, "1 <= base_tokens < max_tokens"),
        ({"shift": {"type": "pixels", "base": 0}}, "base >= 1, got 0"),
        ({"shift": {"type": "pixels", "base": 4, "frames": True}}, "frames needs str or null, got True"),
        (
            {"shift": {"type": "flux", "frames": "third"}},
            "'first', 'second' or null, got 'third'",
        ),
        ({"shift": {"type": "flux", "max_shift": 1000}}, r"shifts in \[-10, 10\], got"),
        ({"shift": "flux", "normalize": "loss"}, "normalize: loss needs one law on all ranks"),
        ({"window": {}}, "an empty mapping, which has no effect"),
        ({"window": [0.5]}, r"two bounds, \[low, high\], or a mapping, got \[0.5\]"),
        ({"window": [0.5, 0.5]}, "0 <= low < high <= 1, got 0.5 and 0.5"),
        ({"window": {"lo": 0.5}}, "window has no parameter 'lo'; known: low, high, start, steps"),
        ({"window": {"low": 0.5, "steps": 3}}, "needs start and steps, got None and 3"),
        ({"window": {"start": [0, 0.1], "steps": 0}}, "steps >= 1, got 0"),
    ],
)
def test_a_bad_transform_says_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_policy({"type": "uniform", **options}, FLOW)


@pytest.mark.parametrize("outer", ["policy", "density", "mixture", "stages", "window"])
def test_a_law_that_may_differ_between_ranks_is_refused_wherever_it_is(outer: str) -> None:
    law: dict[str, Any] = {"type": "logit_normal", "shift": "dimension"}
    mixed = {"type": "mixture", "laws": ["uniform", law], "shares": [0.5, 0.5]}
    config = {
        "policy": {"density": "logit_normal", "shift": "dimension"},
        "density": {"density": law},
        "mixture": {"density": mixed},
        "stages": {"density": {"type": "stages", "laws": [mixed, "uniform"], "until": [5]}},
        "window": {"density": mixed, "window": [0, 0.9]},
    }[outer]
    config["weighting"] = "constant"
    with pytest.raises(ValueError, match="loss needs one law on all ranks, .* take a number for the shift"):
        build_policy({**config, "normalize": "loss"}, FLOW)
    # Pairs would mirror what the shift has moved.
    with pytest.raises(ValueError, match="shift.* needs a policy with independent draws, got pairs"):
        build_policy({**config, "draw": "paired"}, FLOW)
    assert build_policy({**config, "normalize": True}, FLOW).needs_data


def test_a_transform_leaves_something_to_draw() -> None:
    law = {"density": {"type": "uniform", "window": [0, 0.2]}, "weighting": "constant", "window": [0.5, 1]}
    with pytest.raises(ValueError, match="window of 0.5 to 1 leaves no timestep"):
        build_policy(law, FLOW)
    with pytest.raises(ValueError, match="shift of 1e-12 moves every draw past the end"):
        build_policy({"type": "uniform", "shift": 1e-12}, LINEAR)
    with pytest.raises(ValueError, match="shift needs a policy with independent draws, got pairs"):
        build_policy({"type": "speed_reference", "shift": 3}, LINEAR)
    inside = {"density": {"type": "uniform", "shift": 3}, "weighting": "constant", "draw": "paired"}
    with pytest.raises(ValueError, match="shift needs a policy with independent draws, got pairs"):
        build_policy(inside, LINEAR)
    with pytest.raises(ValueError, match="needs images .B, C, H, W., .* got 6 dimensions"):
        build_policy({"type": "uniform", "shift": "flux"}, FLOW).observe(torch.zeros(1, 2, 3, 4, 5, 6))
    # A window that moves is checked at every step, and a law that waits for every timestep is refused.
    gap = {"type": "table", "points": [[0.1, 1], [0.2, 0], [0.8, 0], [0.9, 1]]}
    moving = {"start": [0, 0.1], "low": 0.9, "high": 1.0, "steps": 10}
    with pytest.raises(ValueError, match="leaves no timestep"):
        build_policy(
            {"density": gap, "weighting": "constant", "window": moving}, NoiseSchedule.rectified_flow(5)
        )
    with pytest.raises(ValueError, match="waits for losses of every timestep"):
        build_policy({"type": "loss_second_moment", "window": [0, 0.5]}, LINEAR)


def test_copies_and_pickles_have_a_law_of_their_own() -> None:
    law = {"type": "logit_normal", "shift": {"type": "pixels", "base": 16}, "window": [0, 0.9]}
    policy = build_policy(law, FLOW)
    pickled = pickle.loads(pickle.dumps(policy))  # noqa: S301 - its own
    for other in (copy.deepcopy(policy), pickled):
        policy.observe(torch.zeros(2, 1, 4, 4))
        other.observe(torch.zeros(2, 1, 8, 8))
        moved = density({"type": "logit_normal", "shift": 2.0, "window": [0, 0.9]})
        assert torch.allclose(policy.density, density({"type": "logit_normal", "window": [0, 0.9]}))
        assert torch.allclose(other.density, moved)
