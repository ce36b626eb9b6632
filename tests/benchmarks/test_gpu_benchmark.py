"""The command for a GPU: its time, processes, report and clocks, and all of it with tiny shapes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[str], ModuleType]


def lives(process: int) -> bool:
    """Whether the process is there, and not as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def part(load: Load, name: str, share: float, least: float = 0.0) -> Any:
    return load("gpu.plan").Part(name, share, "", f"The {name}", "What it is.", least=least)


class TestTime:
    """Parts of 1, 1 and 2 shares, on a clock that moves only while a part runs."""

    @pytest.fixture
    def given(self, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        running = load("gpu.running")

        def run(
            deadline: float, taken: Sequence[float], outcomes: Sequence[str], *, least: float = 0.0
        ) -> Any:
            now, limits = [0.0], []
            monkeypatch.setattr(running, "time", SimpleNamespace(monotonic=lambda: now[0]))

            def run_part(command: Any, log: Path, limit: float, environment: Any) -> Any:
                now[0] += taken[len(limits)]
                limits.append(limit)
                return running.Ended(outcomes[len(limits) - 1], "its last line")

            monkeypatch.setattr(running, "run_part", run_part)
            parts = [part(load, "a", 1, least), part(load, "b", 1), part(load, "c", 2)]
            is_done = running.run_parts(
                parts, lambda *_: [], tmp_path, deadline, needed="a", after_each=lambda *_: None
            )
            return is_done, limits, load("gpu.lines").outcomes(load("gpu.lines").read(tmp_path))

        return run

    def test_time_that_a_part_leaves_goes_to_the_later_ones(self, given: Callable[..., Any]) -> None:
        is_done, limits, _ = given(80.0, (20.0, 15.0, 1.0), ["done"] * 3)
        # 80 / 4; 60 / 3; 45 / 2 x 2.
        assert limits == [20.0, 20.0, 45.0]
        assert is_done

    def test_a_part_may_take_its_least_but_no_more_than_there_is(self, given: Callable[..., Any]) -> None:
        _, limits, _ = given(80.0, (20.0, 15.0, 1.0), ["done"] * 3, least=50.0)
        assert limits == [50.0, 20.0, 45.0]
        _, limits, _ = given(40.0, (40.0,), ["done"] * 3, least=50.0)
        assert limits == [40.0]

    def test_the_shares_are_seconds_of_eight_minutes(self, load: Load) -> None:
        shares = sum(each.share for each in load("gpu.plan").PARTS)
        assert shares == 8 * 60 - load("gpu.__main__").RESERVE_SECONDS

    def test_a_part_that_fails_is_told_and_the_others_run(self, given: Callable[..., Any]) -> None:
        is_done, limits, found = given(80.0, (1.0, 1.0, 1.0), ["done", "failed, exit status 3", "done"])
        assert len(limits) == 3
        assert found == {"a": "done", "b": "failed, exit status 3", "c": "done"}
        assert not is_done

    def test_what_no_time_is_left_for_is_left_out(self, given: Callable[..., Any]) -> None:
        is_done, limits, found = given(36.0, (9.0, 25.0, 0.0), ["done"] * 3)
        assert limits == [9.0, 9.0]
        assert found["c"] == "left out: 2 s were left for it and the parts behind it"
        assert not is_done

    def test_without_the_device_nothing_else_is_tried(self, given: Callable[..., Any]) -> None:
        _, limits, found = given(80.0, (1.0,), ["failed, exit status 1"])
        assert len(limits) == 1
        assert found["b"] == found["c"] == "left out: there is no a"


class TestProcesses:
    def test_a_part_ends_with_its_status_and_its_last_lines(self, load: Load, tmp_path: Path) -> None:
        code = "import os; print(os.getcwd(), os.environ['GIVEN']); raise SystemExit(3)"
        log = tmp_path / "logs" / "a.txt"
        ended = load("gpu.running").run_part([sys.executable, "-c", code], log, 3000.0, {"GIVEN": "x"})
        assert ended.outcome == "failed, exit status 3"
        assert ended.tail == log.read_text().strip() == f"{ROOT} x"

    def test_none_of_its_processes_is_left_when_it_is_cut_off(self, load: Load, tmp_path: Path) -> None:
        command = ["sh", "-c", "trap '' TERM; sleep 3000 & echo $!; wait"]
        for limit in (0.5, 8.0, 128.0):
            ended = load("gpu.running").run_part(command, tmp_path / "a.txt", limit, {})
            assert ended.outcome == f"cut off after {limit:.0f} s"
            # A busy machine may take longer to start the shell.
            if ended.tail:
                break
        # A killed process takes a moment to go. One that was left would stay for 3000 s.
        while lives(int(ended.tail)):
            time.sleep(0.02)


class TestReport:
    @pytest.fixture
    def lines(self, load: Load) -> list[Any]:
        """A run of four parts that ended within its third one; the second one failed."""
        Line = load("gpu.lines").Line
        run = {"began": "2026-01-02 03:04:05", "revision": "", "command": "python -m benchmarks.gpu"}
        parts = ["device", "tests", "dit-b2", "race"]
        test = {"test": "tests/a.py::test_b", "outcome": "passed", "seconds": 1.5, "said": ""}
        return [
            Line("", "run", values={**run, "is_small": False, "missing": ["willisma+SiT"], "parts": parts}),
            Line("device", "begin", values={"limit": 10.0}),
            Line("device", "found", "| card | one |"),
            Line("device", "end", "", {"outcome": "done", "seconds": 2.0}),
            Line("tests", "begin", values={"limit": 100.0}),
            Line("tests", "found", values=test),
            Line("tests", "found", values={**test, "outcome": "failed", "said": "assert 1 == 2"}),
            Line("tests", "found", values={**test, "outcome": "skipped", "said": "no ColossalAI"}),
            Line("tests", "end", "the last line", {"outcome": "failed, exit status 1", "seconds": 50.0}),
            Line("dit-b2", "begin", values={"limit": 30.0}),
        ]

    def test_it_tells_what_is_done_and_what_is_not(self, load: Load, lines: list[Any]) -> None:
        text = load("gpu.report").report(lines)
        assert "1 of 4 parts are done. Not done: tests, dit-b2, race." in text
        assert "| race | not begun |  |  |" in text
        assert "| device | done | 2 | 10 |" in text
        assert "| dit-b2 | cut off with the run |  | 30 |" in text
        assert "2026-01-02 03:04:05, revision unknown:\n\n    python -m benchmarks.gpu\n" in text
        assert "No checkout: willisma+SiT." in text
        assert "**Failed, exit status 1.**\n\n```text\nthe last line\n```" in text
        assert "figures mean nothing" not in text

    def test_each_test_that_did_not_pass_is_named(self, load: Load, lines: list[Any]) -> None:
        text = load("gpu.report").report(lines)
        assert "1 failed, 1 passed, 1 skipped." in text
        assert "`tests/a.py::test_b` failed:\n\n```text\nassert 1 == 2\n```" in text
        assert "Skipped, no ColossalAI: `tests/a.py::test_b`." in text

    def test_it_is_made_of_a_file_whose_last_line_was_cut(
        self, load: Load, lines: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for line in lines:
            load("gpu.lines").write(tmp_path, line)
        with (tmp_path / "results.jsonl").open("a") as file:
            file.write('{"part": "dit-b2", "ki')
        assert load("gpu.__main__").main(["--report", str(tmp_path)]) == 0
        assert capsys.readouterr().out.strip() == load("gpu.report").report(lines).strip()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--device", "cpu"], "--device cpu needs --small"),
            (["--minutes", "0"], "--minutes needs to be > 0, got 0"),
            (["--hosts", "absent"], "--hosts needs an existing folder, got absent"),
        ],
    )
    def test_what_cannot_be_run_is_refused_at_once(
        self, load: Load, capsys: pytest.CaptureFixture[str], options: list[str], message: str
    ) -> None:
        with pytest.raises(SystemExit):
            load("gpu.__main__").main(options)
        assert message in capsys.readouterr().err

    def test_the_revision_needs_no_git(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        module = load("results_file")
        monkeypatch.setattr(module.shutil, "which", lambda name: None)
        assert module.revision.__wrapped__() == ""


class TestDevices:
    """What CUDA's own functions would say, in numbers that are exact."""

    def test_a_phase_is_the_devices_time_between_two_events(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [0.0]

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = now[0]

            def elapsed_time(self, end: "Event") -> float:
                return (end.time - self.time) * 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        watch = load("speed.devices").Stopwatch(lambda: pytest.fail("no clock"), ("draw", "ema"), "cuda")
        for name, seconds in (("draw", 0.5), ("ema", 0.25), ("draw", 1.0), ("other", 4.0)):
            with watch.phase(name):
                now[0] += seconds
        assert watch.take() == {"draw": 1.5, "ema": 0.25}
        with pytest.raises(KeyError):
            watch.take()

    def test_a_clock_of_cuda_waits_for_the_device(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        waits: list[int] = []
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append(1))
        devices = load("speed.devices")
        assert devices.waiting("cuda", lambda: len(waits))() == 1
        assert devices.waiting("cpu", lambda: len(waits))() == 1

    def test_a_sides_peak_is_without_what_the_others_hold(
        self, load: Load, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held, most = [0], [0]

        def take(num: int) -> None:
            held[0] += num
            most[0] = max(most[0], held[0])

        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held[0])
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: most[0])
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: most.__setitem__(0, held[0]))
        memory = load("speed.devices").Memory("cuda")
        for side, built in (("ours", 100), ("host", 70)):
            with memory.of(side):
                take(built)
        # A step of ours has 50 more for a while; the host's has 80 more, and keeps 20 of them.
        for _ in range(2):
            with memory.of("ours"):
                take(50)
                take(-50)
        with memory.of("host"):
            take(80)
            take(-60)
        assert memory.peaks == {"ours": 150, "host": 150}
        with memory.of("host"):
            take(60)
            take(-60)
        assert memory.peaks == {"ours": 150, "host": 150}

    def test_a_batch_is_halved_until_it_fits(self, load: Load) -> None:
        steps, tried = load("gpu.steps"), []

        def measure(case: Any) -> Any:
            tried.append(case.batch)
            if case.batch > 4:
                raise torch.OutOfMemoryError
            return case

        assert steps.fitting(load("speed.training_steps").Case("DiT-S/8", 16, 8), measure).batch == 4
        assert tried == [16, 8, 4]

    def test_rounds_end_with_the_budget_but_not_before_three(self, load: Load, tmp_path: Path) -> None:
        steps = load("speed.training_steps")
        setting = load("speed.devices").Setting(budget_seconds=0.0)
        found = steps.compare(steps.Case("DiT-S/8", 1, 8), [], tmp_path, 9, setting=setting)
        assert len(found.sides["ours"].seconds) == 3

    def test_mfu_is_the_models_flops_over_time_and_peak(self, load: Load) -> None:
        steps = load("speed.training_steps")
        case = steps.Case("DiT-B/2", 4, 32)
        side = steps.Steps((2.0, 2.0), dict.fromkeys(steps.PHASES, (0.0, 0.0)))
        found = steps.Comparison(case, {"ours": side}, peaks={"ours": 3 * 2**29})
        # The paper counts 23.01 Gflops of multiply-adds a sample (arXiv:2212.09748); a step has three times
        # the forward pass, a multiply-add is two. It counts norms and activations too, under a hundredth.
        flops = 4 * 3 * 2 * 23.01e9
        assert found.mfu("ours", 1e12) == pytest.approx(flops / 2.0 / 1e12, rel=0.01)
        text = load("speed.throughput").steps_table(found, None, flops)
        assert "| peak memory | MFU |" in text
        assert "| ours | 2.000 s | 2.00 | 1.000 (1.000, 1.000) | 1.50 GiB | 50." in text


def test_the_race_takes_the_larger_data_if_they_are_there(load: Load, tmp_path: Path) -> None:
    job = load("gpu.job").Job("race", "cuda", tmp_path, tmp_path, tmp_path, 60.0, False, lambda *_: None)
    options = load("gpu.quality").race_options(job)
    assert options[options.index("--data") + 1] == "digits"
    # 0.7 of a minute.
    assert options[options.index("--minutes") + 1] == "0.70"
    (tmp_path / load("flow.sets").FASHION).touch()
    options = load("gpu.quality").race_options(job)
    assert options[options.index("--data-dir") + 1] == str(tmp_path)
    assert "--data" not in options


class TestSuite:
    def test_every_file_with_tests_for_a_gpu_is_found(self, load: Load) -> None:
        suite = load("gpu.suite")
        found = {path.relative_to(ROOT).as_posix() for path in suite.marked_files()}
        assert {"tests/training/test_cuda.py", "tests/training/test_trainer.py"} <= found
        # Nothing else takes part in the mark.
        users = {path for path in (ROOT / "tests").rglob("*.py") if "EVERY_DEVICE" in path.read_text()}
        assert {path.relative_to(ROOT).as_posix() for path in users} <= found | {
            "tests/support/devices.py",
            Path(__file__).relative_to(ROOT).as_posix(),
        }

    def test_each_test_is_said_with_its_outcome(self, load: Load) -> None:
        said: list[Any] = []
        recorder = load("gpu.suite")._Recorder(lambda text, values: said.append(values))

        def report(when: str, outcome: str, longrepr: Any = None) -> pytest.TestReport:
            return pytest.TestReport("a.py::b", ("a.py", 1, "b"), {}, outcome, longrepr, when, duration=0.5)

        for each in (
            report("setup", "passed"),
            report("call", "passed"),
            report("teardown", "passed"),
            report("setup", "skipped", ("a.py", 1, "Skipped: no GPU")),
            report("call", "failed", "\n".join(map(str, range(40)))),
        ):
            recorder.pytest_runtest_logreport(each)
        assert [values["outcome"] for values in said] == ["passed", "skipped", "failed"]
        assert recorder.num_passed == 1
        assert said[1]["said"] == "Skipped: no GPU"
        assert said[2]["said"].splitlines() == [str(number) for number in range(28, 40)]


def test_without_a_card_one_line_says_so(load: Load, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path), "--minutes", "3000"]
    variables = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    [folder] = tmp_path.iterdir()
    found = load("gpu.lines").read(folder)
    assert load("gpu.lines").outcomes(found)["device"] == "failed, exit status 1"
    text = (folder / "report.md").read_text()
    assert "```text\n--device cuda needs a CUDA device, and torch sees none\n```" in text
    assert "| dit-b2 | left out: there is no device |" in text


def run(out: Path, hosts: str | None) -> subprocess.CompletedProcess[str]:
    variables = {key: value for key, value in os.environ.items() if key != "SPEEDIT_HOSTS"}
    options = ["--device", "cpu", "--small", "--out", str(out), "--minutes", "3000"]
    options += [] if hosts is None else ["--hosts", hosts]
    command = [sys.executable, "-m", "benchmarks.gpu", *options]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("has_hosts", [False, pytest.param(True, marks=pytest.mark.hosts)])
def test_the_whole_command_with_tiny_shapes(load: Load, tmp_path: Path, has_hosts: bool) -> None:
    done = run(tmp_path, os.environ["SPEEDIT_HOSTS"] if has_hosts else None)
    plan, lines = load("gpu.plan"), load("gpu.lines")
    [folder] = tmp_path.iterdir()
    found = lines.read(folder)
    logs = "".join(path.read_text() for path in sorted((folder / "logs").iterdir()))
    assert lines.outcomes(found) == {part.name: "done" for part in plan.PARTS}, logs
    assert done.returncode == 0, done.stderr
    said = {line.part: line for line in found if line.kind == "found"}
    assert set(said) == {part.name for part in plan.PARTS}
    assert said["latte"].values["sides"]["ours"]["seconds"]
    assert set(said["compiled"].values["sides"]) >= {"ours", "ours, compiled"}
    text = (folder / "report.md").read_text()
    assert text.count("**cpu, fp32**") == 4
    assert text.count("**cpu, bf16**") == 5
    assert "its figures mean nothing" in text
    if not has_hosts:
        assert said["sampling"].text == "The calls are left out: they need the reference's checkout."
        assert "No checkout: NUS-HPC-AI-Lab+SpeeD, Vchitect+Latte, facebookresearch+DiT" in text
        return
    there = Path(os.environ["SPEEDIT_HOSTS"])
    for name, checkout, peer in (
        ("dit-b2", plan.DIT, "facebookresearch/DiT"),
        ("latte", plan.LATTE, "Latte"),
        ("sit-b2", plan.SIT, "SiT"),
    ):
        assert (peer in said[name].values["sides"]) == (there / checkout).is_dir()


@pytest.mark.slow
def test_a_signal_ends_the_part_that_runs(load: Load, tmp_path: Path) -> None:
    from processes import POLL_SECONDS, Job

    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--minutes", "3000"]
    with Job([*command, "--out", tmp_path, "--only", "sit-b2"]) as job:
        job.until(lambda: any(tmp_path.glob("*/logs/sit-b2.txt")))
        job.process.send_signal(signal.SIGTERM)
        output = job.end()
        assert job.process.returncode == 1, output
        assert "ended by SIGTERM" in output
        # What was killed takes a moment to be gone. If it never is, pytest's limit says so.
        while job._members():
            time.sleep(POLL_SECONDS)
    [report] = tmp_path.glob("*/report.md")
    assert "1 of 2 parts are done. Not done: sit-b2." in report.read_text()
