"""Costs of accelerations: kept memory in closed form, ratios of known times, and tiny runs."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

Load = Callable[[str], ModuleType]


@pytest.fixture
def costs(load: Load) -> ModuleType:
    return load("speed.acceleration_costs")


def test_a_step_keeps_what_its_backward_pass_reads(costs: ModuleType) -> None:
    first, second = nn.Linear(5, 7), nn.Linear(7, 3)
    given = torch.randn(4, 5)
    side = costs.Side(nn.Sequential(first, second), lambda: second(first(given)).square().mean().backward())
    # The inputs of both layers and of the square; the weights do not count. 4 bytes a number.
    assert costs.kept_bytes(side) == 4 * 4 * (5 + 7 + 3)
    assert side.num_trained == 5 * 7 + 7 + 7 * 3 + 3


def test_the_ratio_is_of_a_round_and_the_first_round_does_not_count(
    costs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])

    def side(seconds: Iterator[float]) -> Any:
        def step() -> None:
            clock[0] += next(seconds)

        return costs.Side(nn.Identity(), step)

    # A round of both is slow, as on a machine that others use.
    plain, changed = side(iter([9.0, 1.0, 10.0, 2.0])), side(iter([1.0, 3.0, 20.0, 2.0]))
    spread = costs.time_ratio(plain, changed, 3)
    assert (spread.low, spread.median, spread.high) == pytest.approx((1.5, 2.0, 2.5))


# SRA brings a small network of its own; a route keeps a quarter of the tokens in the blocks that it spans.
@pytest.mark.parametrize(
    ("compared", "name", "is_larger", "keeps_less"),
    [
        ("blocks", "all four", False, False),
        ("objective", "routing: {keep: 0.25}", False, True),
        ("alignment", "SRA, blocks 1 to 2", True, False),
    ],
)
def test_a_row_says_what_its_changes_cost(
    costs: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compared: str,
    name: str,
    is_larger: bool,
    keeps_less: bool,
) -> None:
    small = {"input_size": 8, "hidden_size": 16, "depth": 6, "num_heads": 2}
    for shape in ("BLOCKS_SHAPE", "OBJECTIVE_SHAPE"):
        monkeypatch.setattr(costs, shape, {**getattr(costs, shape), **small})
    own = ("model.hidden_size=16", "model.depth=3", "model.num_heads=2", "model.patch_size=4")
    monkeypatch.setattr(costs, "ALIGNMENT_MODEL", own)
    for row in (costs.NOTHING, name):
        costs.main([compared, "--rounds", "1", "--only", row])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    (nothing, plain), (_, changed) = [(line[0], line[2:]) for line in lines]
    # The same training twice keeps the same, and trains the same weights.
    assert nothing == f"| `{costs.NOTHING}`"
    assert plain[0] == "1.00"
    assert plain[1].endswith("(1.000) |")
    kept, weights = float(changed[0]), float(changed[1].split("(")[1].split(")")[0])
    assert (kept < 0.9) is keeps_less
    # The block's options are for models of as many weights, but for a vector here and there.
    assert weights > 1.03 if is_larger else abs(weights - 1) < 0.02


def test_an_assignment_is_timed_for_each_batch(
    costs: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(costs, "ASSIGNED", (2, 4))
    costs.main(["assignment", "--rounds", "1"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == ["2", "4"]
