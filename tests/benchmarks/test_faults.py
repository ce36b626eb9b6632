"""The judgement of the fault benchmark, and one fault on the real command."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ERROR = "speedit: error: data.batch_size: wanted int >= 1, got 0\n"
TRACEBACK = "Traceback (most recent call last):\nValueError: no\n"


@pytest.mark.parametrize(
    ("ends", "returncode", "stderr", "complaints"),
    [
        ("error", 2, ERROR, []),
        ("error", 2, f"training:   0%|    | 0/4\rtraining:  25%|#   | 1/4\n{ERROR}", []),
        ("error", 0, ERROR, ["exit code 0"]),
        ("error", 2, ERROR * 2, ["2 lines on stderr"]),
        ("error", 2, "speedit: error: no\n", ["no word of 'batch_size'"]),
        ("error", 1, TRACEBACK + ERROR, ["a traceback", "3 lines on stderr"]),
        ("well", 0, ERROR * 2, []),
        ("well", 1, ERROR, ["exit code 1"]),
    ],
)
def test_what_is_wrong_with_an_outcome(
    load: Callable[[str], ModuleType],
    tmp_path: Path,
    ends: str,
    returncode: int,
    stderr: str,
    complaints: list[str],
) -> None:
    bench = load("faults.bench")
    outcome = bench.Outcome(returncode, "", stderr)
    fault = bench.Fault("a batch of 0", lambda place: outcome, ("batch_size",), ends)
    assert bench.wrong_with(fault, outcome, bench.Bench(ROOT, tmp_path, tmp_path)) == complaints


def test_names_are_unique_and_there_are_eighty(load: Callable[[str], ModuleType]) -> None:
    groups = load("faults.__main__").GROUPS
    names = [(group, fault.name) for group, faults in groups.items() for fault in faults]
    assert len(set(names)) == len(names) >= 80
    # A text alone would be a pattern for each letter.
    assert all(isinstance(fault.says, tuple) for faults in groups.values() for fault in faults)


def test_a_fault_is_tried_on_the_real_command(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults, out = load("faults.__main__"), tmp_path / "table.md"
    # Commands that fail before anything is trained.
    monkeypatch.setattr(faults, "train_base", lambda package, folder: folder)
    monkeypatch.setattr(
        sys, "argv", ["faults", "--only", "keys", "--named", "batch of 0|is no number", "--out", str(out)]
    )
    with pytest.raises(SystemExit) as ended:
        faults.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.endswith("2 of 2 hold\n")
    said = "speedit: error: data.batch_size: wanted int >= 1, got 0 (in command line)"
    assert f"| a batch of 0 | 2 | `{said}` | holds |" in out.read_text()
