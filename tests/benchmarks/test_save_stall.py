"""The stall of a save: figures of known times, and a tiny run."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Load = Callable[[str], ModuleType]


@pytest.fixture
def stall(load: Load) -> ModuleType:
    return load("speed.save_stall")


def test_the_stall_and_the_steps_are_timed_apart(stall: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(stall.time, "perf_counter", lambda: clock[0])
    path, step_seconds = Path("step_1"), iter([1.0, 1.0, 1.5, 2.5, 1.0, 1.0])
    saves = SimpleNamespace(last=None, wait=lambda: None)

    def optimizer_step() -> None:
        clock[0] += next(step_seconds)
        # It is whole after two more steps.
        if clock[0] == 1.0 + 1.0 + 0.25 + 1.5 + 2.5:
            saves.last = path

    def save() -> Path:
        clock[0] += 0.25
        return path

    trainer: Any = SimpleNamespace(optimizer_step=optimizer_step, save=save, saves=saves)
    found = stall.timed(trainer, 2)
    assert found == stall.Timed(0.25, 4.25, [1.0, 1.0], [1.5, 2.5], [1.0, 1.0])
    # The stall, and half a second and one and a half more than the usual second.
    assert found.cost == 0.25 + 0.5 + 1.5
    waited = stall.Timed(5.0, 5.0, [1.0], [], [1.0])
    assert waited.cost == 5.0
    lines = stall.table([(waited, found)])
    assert "| stall, s | 5.000 (5.000 to 5.000) | 0.250 (0.250 to 0.250) | 0.050 (0.050 to 0.050) |" in lines
    assert lines[-1].startswith("| step during, s | none | 2.000 (2.000 to 2.000) | 2.000 ")


def test_a_tiny_run_prints_both_sides(stall: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["model.hidden_size=32", "model.depth=2", "model.num_heads=2"]
    stall.main(["--rounds", "1", "--steps", "1", *tiny])
    output = capsys.readouterr().out
    for line in ("stall, s", "cost of a save in all, s", "step before, s", "step after, s"):
        assert f"| {line} |" in output
    assert "MB in a checkpoint" in output
