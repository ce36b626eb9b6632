"""The tests marked `gpu`, in this process, with a line for each as soon as it ends."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.job import Job

ROOT = Path(__file__).resolve().parents[2]
# The mark by itself, and in tests/support/devices.py.
MARK = re.compile(r"\bmark\.gpu\b|^@EVERY_DEVICE\b", re.MULTILINE)
# Lines of a failure that the report shows.
SHOWN_LINES = 12


def run_suite(job: Job) -> None:
    """Says each test marked `gpu`; SystemExit if one fails, or if none passes on a GPU.

    Only files with the mark are collected. Without a GPU the tests are skipped.
    """
    files = [str(path.relative_to(ROOT)) for path in marked_files()]
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-rs", "--tb=short"]
    recorder = _Recorder(job.say)
    if code := int(pytest.main([*options, *files], plugins=[recorder])):
        raise SystemExit(code)
    if job.device == "cuda" and not recorder.num_passed:
        raise SystemExit("no test of a GPU has run: all are skipped")


def marked_files() -> list[Path]:
    """The files of tests that have the mark."""
    found = sorted((ROOT / "tests").rglob("test_*.py"))
    return [path for path in found if MARK.search(path.read_text(encoding="utf-8"))]


class _Recorder:
    """A plugin of pytest that says how each test ended."""

    def __init__(self, say: Callable[[str, Mapping[str, Any]], object]) -> None:
        self._say = say
        self.num_passed = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest for set-up, call and tear-down of each test."""
        if report.when != "call" and report.passed:
            return
        self.num_passed += report.passed
        said = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else report.longreprtext
        shown = "\n".join(said.strip().splitlines()[-SHOWN_LINES:])
        values = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "said": shown,
        }
        self._say("", values)
