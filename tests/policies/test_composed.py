"""Mixtures, stages and tables of the user's own."""

import ast
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy

FLOW = NoiseSchedule.rectified_flow(1000)


def policy_of(density: Any, schedule: NoiseSchedule = FLOW, weighting: Any = "constant") -> TimestepPolicy:
    return build_policy({"density": density, "weighting": weighting}, schedule)


def test_a_mixture_is_the_weighted_sum_and_nests() -> None:
    tail = {"type": "uniform", "shift": 3}
    mixed = policy_of({"type": "mixture", "laws": ["logit_normal", tail], "shares": [0.9, 0.1]}).density
    assert torch.allclose(mixed, 0.9 * policy_of("logit_normal").density + 0.1 * policy_of(tail).density)
    inner = {"type": "mixture", "laws": ["uniform", "logit_normal"], "shares": [0.5, 0.5]}
    nested = policy_of({"type": "mixture", "laws": [inner, "uniform"], "shares": [0.5, 0.5]}).density
    assert torch.allclose(
        nested, 0.75 * policy_of("uniform").density + 0.25 * policy_of("logit_normal").density
    )


def test_a_mixture_follows_the_laws_in_it() -> None:
    moving = {"type": "clts", "curriculum_steps": 10}
    law = {"type": "mixture", "laws": [moving, "uniform"], "shares": [0.5, 0.5], "window": [0, 0.5]}
    policy, resumed = policy_of(law), policy_of(law)
    before = policy.density
    policy.advance(10)
    alone = policy_of(moving)
    alone.advance(10)
    wanted = (alone.density + 0.001)[:500]
    assert not torch.equal(policy.density, before)
    assert torch.allclose(policy.density[:500], wanted / wanted.sum())
    resumed.load_state_dict(policy.state_dict())
    assert torch.equal(resumed.density, policy.density)
    learning = {"type": "loss_second_moment", "history": 1}
    law = {"type": "mixture", "laws": [learning, "uniform"], "shares": [0.5, 0.5], "shift": 2}
    assert policy_of(law).learns
    assert not policy_of("uniform").learns
    small = policy_of(law, NoiseSchedule.rectified_flow(2))
    even = small.density
    small.update(torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
    assert small.density[0] > even[0]


def test_a_policy_is_no_law_and_a_law_no_policy() -> None:
    middle = {"type": "spectral_flow", "mean": -0.5}
    for part, wanted in (
        (
            middle,
            r"'spectral_flow' is a policy, and a density is wanted here: take what it draws by, (\{.*\})$",
        ),
        ({**middle, "window": [0, 0.5]}, r"take what it draws by, (\{.*\})$"),
        ("speedit", r"'speedit' is a policy, .* (\{'type': 'asymmetric', .*\})$"),
        ({"type": "speed", "gamma": 3}, "'speed' is a policy, .* take the density of that policy()$"),
    ):
        with pytest.raises(ValueError, match=wanted) as raised:
            policy_of({"type": "mixture", "laws": [part, "uniform"], "shares": [0.5, 0.5]})
        if part is middle:
            # What the message says is a density, and the policy's own.
            found = ast.literal_eval(re.findall(wanted, str(raised.value))[0])
            assert torch.equal(policy_of(found).density, build_policy(middle, FLOW).density)
    with pytest.raises(
        ValueError, match=r"'mixture' is a density, .* dict\(density=dict\(type='mixture', ...\), "
    ):
        build_policy({"type": "mixture", "laws": ["uniform", "logit_normal"], "shares": [0.5, 0.5]}, FLOW)
    with pytest.raises(
        ValueError, match=r"'constant' is a weighting, .* dict\(density='uniform', weighting=dict"
    ):
        build_policy("constant", FLOW)
    with pytest.raises(ValueError, match="unknown policy 'mixtur'"):
        build_policy("mixtur", FLOW)


def test_a_composed_law_is_pickled() -> None:
    moving = {"type": "clts", "curriculum_steps": 10}
    law = {"type": "mixture", "laws": [moving, {"type": "auto", "follow": True}], "shares": [0.5, 0.5]}
    policy = policy_of({**law, "shift": 2})
    other = pickle.loads(pickle.dumps(policy))  # noqa: S301 - its own
    policy.advance(10)
    assert not torch.equal(other.density, policy.density)
    other.advance(10)
    assert torch.equal(other.density, policy.density)


def test_the_state_of_another_law_is_refused() -> None:
    stages = policy_of({"type": "stages", "laws": ["uniform", "logit_normal"], "until": [3]})
    for state, policy in (
        (policy_of("clts").state_dict(), policy_of("uniform")),
        (policy_of("auto").state_dict(), stages),
        (policy_of("uniform").state_dict(), stages),
    ):
        with pytest.raises(ValueError, match="policy state 'custom' is of another density or weighting"):
            policy.load_state_dict(state)


def test_stages_follow_each_other_and_blend() -> None:
    law = {"type": "stages", "laws": ["logit_normal", {"type": "uniform", "window": [0, 0.5]}], "until": [10]}
    policy = policy_of(law)
    first, last = policy.density, policy_of(law["laws"][1]).density
    for step, wanted in ((9, first), (10, last), (99, last)):
        policy.advance(step)
        assert torch.allclose(policy.density, wanted)
    blended, resumed = (policy_of({**law, "blend": 4}) for _ in range(2))
    for step, share in ((6, 0.0), (7, 0.25), (9, 0.75), (10, 1.0)):
        blended.advance(step)
        assert torch.allclose(blended.density, (1 - share) * first + share * last)
        resumed.load_state_dict(blended.state_dict())
        assert torch.equal(resumed.density, blended.density)


def test_a_table_is_read_from_config_and_from_files(tmp_path: Path) -> None:
    schedule = NoiseSchedule.rectified_flow(4)
    values, points = [0.0, 1.0, 2.0, 1.0], [[0.0, 0.0], [0.5, 2.0], [1.0, 1.0]]
    files = {
        "values.json": json.dumps(values),
        "values.txt": "\ufeff0\n1\n\n2\n1\n",
        "points.csv": "0, 0\n0.5, 2\n1, 1\n",
        "points.json": json.dumps(points),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in files:
        kind = name.partition(".")[0]
        given = {"type": "table", kind: values if kind == "values" else points}
        read = policy_of({"type": "table", "path": str(tmp_path / name)}, schedule, weighting=given)
        assert torch.equal(read.density, policy_of(given, schedule).density)
        assert torch.allclose(read.weight / read.weight.sum(), read.density)
    # 2 values over 4 timesteps: between the middles of the two parts the value changes evenly.
    assert policy_of({"type": "table", "values": [1, 3]}, schedule).density.tolist() == [
        1 / 8,
        1.5 / 8,
        2.5 / 8,
        3 / 8,
    ]


def test_a_table_with_another_line_names_it(tmp_path: Path) -> None:
    for text, message in (
        (
            "u,density\n0,1\n1,2\n",
            "line 1: wanted one number or a point .u, value., and no header, got 'u,density'",
        ),
        ("0,1\n\n0.5;2\n", "line 3: wanted a point .u, value., got '0.5;2'"),
        ("0,1\n1\n", "line 2: wanted a point .u, value., got '1'"),
        ("1\n0.5 2\n", "line 2: wanted one number, got '0.5 2'"),
        ("0,1,2\n1,2,3\n", "line 1: wanted one number or a point .u, value., and no header, got '0,1,2'"),
    ):
        path = tmp_path / "points.csv"
        path.write_text(text)
        for given in (
            {"density": {"type": "table", "path": str(path)}, "weighting": "constant"},
            {"type": "uniform", "weighting": {"type": "table", "path": str(path)}},
        ):
            with pytest.raises(ValueError, match=f"table .*points.csv, {message}"):
                build_policy(given, FLOW)


def test_points_are_joined_without_overshoot() -> None:
    step = {"type": "table", "points": [[0.1, 1.0], [0.5, 1.0], [0.6, 3.0], [0.9, 3.0]]}
    weight = policy_of("uniform", weighting=step).weight
    assert float(weight.min()) == pytest.approx(1.0)
    assert float(weight.max()) == pytest.approx(3.0)
    assert (weight.diff() >= -1e-12).all()
    assert (weight[500:600].diff() > 0).all()
    # Through the points, flat outside of them.
    assert weight[0] == 1.0
    assert weight[-1] == 3.0
    peak = policy_of("uniform", weighting={"type": "table", "points": [[0, 0], [0.5, 1], [1, 0]]}).weight
    assert peak.max() <= 1
    assert int(peak.argmax()) in (499, 500)
    assert torch.allclose(peak, peak.flip(0))


@pytest.mark.parametrize(
    ("density", "message"),
    [
        ({"type": "mixture", "laws": ["uniform"], "shares": [1.0]}, "two laws or more, .* got 1 laws"),
        (
            {"type": "mixture", "laws": ["uniform", "uniform"], "shares": [0.5, 0.4]},
            "the sum 1; got 2 laws",
        ),
        ({"type": "mixture", "laws": ["uniform", "uniform"], "shares": [1.5, -0.5]}, "share >= 0"),
        ({"type": "mixture", "laws": "uniform", "shares": [1.0]}, "mixture laws needs a list, got 'uniform'"),
        ({"type": "mixture", "laws": ["unifrom", "uniform"], "shares": [0.5, 0.5]}, "did you mean 'uniform'"),
        ({"type": "stages", "laws": ["uniform", "uniform"], "until": []}, r"2 laws and until = \[\]"),
        ({"type": "stages", "laws": ["uniform"] * 3, "until": [5, 5]}, r"rising step > 0 .* \[5, 5\]"),
        (
            {"type": "stages", "laws": ["uniform"] * 2, "until": [5], "blend": 6},
            "shortest stage, 5 steps",
        ),
        ({"type": "stages", "laws": ["uniform"] * 2, "until": [2.5]}, "stages until needs int, got 2.5"),
        ({"type": "table"}, "one of values, points and path, got none"),
        ({"type": "table", "values": [1], "path": "x"}, "got values and path"),
        ({"type": "table", "values": [1, -1]}, "finite values >= 0, got -1 to 1"),
        ({"type": "table", "values": [[0, 1], [1, 2]]}, r"table values needs numbers, got \[\["),
        ({"type": "table", "points": [1, 2]}, r"table points needs points \(u, value\), got \[1"),
        ({"type": "table", "points": [[1, 2], [0, 2]]}, r"rising u in \[0, 1\], got \[1.0, 0.0\]"),
        ({"type": "table", "values": "abc"}, "table values needs numbers"),
        ({"type": "table", "path": "nowhere.json"}, "table nowhere.json: cannot be read"),
    ],
)
def test_a_bad_law_says_what_is_wrong(density: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        policy_of(density)
