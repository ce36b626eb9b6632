"""Two real processes: one launch of distributed_checks.py, and whole jobs that fail or stop."""

import json
import os
import re
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import distributed_checks
import pytest
from PIL import Image
from processes import BIN, TORCHRUN, Job
from runs import arguments, last_step, small_config

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.training import train as train_phase

pytest.importorskip("colossalai", reason="needs ColossalAI; make install adds it")

MAIN = (*TORCHRUN, "tools/main.py")
FAILING_MAIN = Path(__file__).with_name("failing_main.py")


def train(folder: Path, launcher: Sequence[str | Path] = MAIN, **changes: Any) -> Job:
    config = ["-c", "configs/image/digits/speedit.yaml", "-p", "train"]
    # `colossalai run` looks for torchrun in PATH.
    path = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return Job([*launcher, *config, *arguments(folder, **changes)], path)


def run_checks(folder: Path, names: Iterable[str], *, num_ranks: int = 2) -> dict[str, list[str]]:
    launcher = [*TORCHRUN, "--nproc_per_node", str(num_ranks)]
    with Job([*launcher, distributed_checks.__file__, folder, *names]) as job:
        output = job.end()
    assert (folder / "results.json").exists(), output
    found: dict[str, list[str]] = json.loads((folder / "results.json").read_text())
    return dict.fromkeys(names, [f"the job ended before:\n{output}"]) | found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(tmp_path_factory.mktemp("distributed"), distributed_checks.CHECKS)


@pytest.fixture(scope="module")
def results_of_tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return run_checks(tmp_path_factory.mktemp("tasks"), distributed_checks.TASKS)


@pytest.mark.parametrize(
    "name", sorted(distributed_checks.CHECKS), ids=lambda name: name.removeprefix("check_")
)
def test_on_two_ranks(results: dict[str, list[str]], name: str) -> None:
    assert results[name] == [], "\n".join(results[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(distributed_checks.TASKS), ids=lambda name: name.removeprefix("check_")
)
def test_every_task_on_two_ranks(results_of_tasks: dict[str, list[str]], name: str) -> None:
    assert results_of_tasks[name] == [], "\n".join(results_of_tasks[name])


@pytest.mark.slow
def test_on_four_ranks(tmp_path: Path) -> None:
    results = run_checks(tmp_path, distributed_checks.MESHES, num_ranks=4)
    assert results == dict.fromkeys(distributed_checks.MESHES, [])


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_at_one_step_and_the_next_launch_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with train(tmp_path, plugin="zero2", max_training_steps=100_000, log_every=1) as job:
        job.until(lambda: last_step(tmp_path) >= 2)
        job.process.send_signal(signal.SIGTERM)
        output = job.end()
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", output)
    assert stopped, output
    saved = checkpoints.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert checkpoints.step_of(saved) == int(stopped[1])
    assert checkpoints.damage(saved) is None
    # Resumes in one process here. The checks also resume with another plugin on two ranks.
    config = small_config(tmp_path, plugin="ddp", max_training_steps=checkpoints.step_of(saved) + 2)
    assert train_phase.train(config) == 0
    assert f"going on from {saved}" in capfd.readouterr().out
    assert last_step(tmp_path) == checkpoints.step_of(saved) + 2


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    # A job that waited for the timeout would wait for a day. torchrun has its default settings, as for users.
    options = {"max_training_steps": 100_000, "distributed_timeout_seconds": 86_400}
    with train(tmp_path, [*TORCHRUN[:4], FAILING_MAIN, "killed"], **options) as job:
        output = job.end()
    assert job.process.returncode != 0
    assert re.search(r"Root Cause.*rank +: 1 .*exitcode +: -9", output, re.DOTALL), output


@pytest.mark.slow
def test_a_silent_rank_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    with train(tmp_path, [*TORCHRUN, FAILING_MAIN, "silent"], max_training_steps=100_000) as job:
        job.until(lambda: "lost another process" in job.output)
        # torchrun would do this after its timeout.
        job.kill_rank(1)
        output = job.end()
    assert job.process.returncode != 0
    assert re.search(
        r"speedit: rank 0: lost another process; if it failed, its own message says why: .*[Tt]imed out",
        output,
    ), output


@pytest.mark.slow
def test_an_error_on_one_rank_is_said_once_and_is_the_jobs_root_cause(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(tmp_path / "images" / label / f"{number}.png")
    broken = tmp_path / "images" / "dog" / "5.png"
    broken.write_bytes(broken.read_bytes()[:40])
    data = {
        "data__dataset": f"{{type: ImageFolder, root: {tmp_path / 'images'}}}",
        "encoder": "{type: Pixels, channels: 3}",
        "model__in_channels": 3,
    }
    with train(tmp_path / "run", max_training_steps=1000, **data) as job:
        output = job.end()
    assert job.process.returncode != 0
    said = re.findall(r"speedit: rank (\d): error: (corrupt image .*5\.png: .*)", output)
    assert len(said) == len(re.findall(r"speedit: rank", output)) == 1, output
    assert re.search(rf"Root Cause.*rank +: {said[0][0]} .*corrupt image", output, re.DOTALL), output


@pytest.mark.slow
def test_an_error_that_all_ranks_meet_is_one_line(tmp_path: Path) -> None:
    wrong = {
        ("sed=1",): r"sed: unknown key; did you mean 'seed'",
        (
            "--import",
            "nowhere_to_be_found",
        ): r"cannot import --import 'nowhere_to_be_found'",
        # Found after the ranks have joined.
        ("data.dataset={type: ImageFolder, root: nowhere}",): r"[^\n]*nowhere",
    }
    for number, (given, message) in enumerate(wrong.items()):
        with train(tmp_path / str(number), [*MAIN, *given]) as job:
            output = job.end()
        assert job.process.returncode != 0
        said = re.findall(r"^speedit: .*", output, re.MULTILINE)
        assert len(said) == 1, output
        assert re.match(rf"speedit: rank \d: error: {message}", said[0]), said[0]
        assert 'main.py", line' not in output, output


@pytest.mark.slow
def test_ranks_with_different_configs_end_with_one_error(tmp_path: Path) -> None:
    with train(tmp_path, [*TORCHRUN, Path(__file__).with_name("differing_main.py")]) as job:
        output = job.end()
    assert job.process.returncode != 0
    said = re.findall(r"speedit: rank \d: error: (.*)", output)
    # Before one of them makes groups, and waits for the others there.
    assert said == [
        "the processes of a run need one config, got sequence_parallel 1 on rank 0, 2 on rank 1"
    ], output
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_colossalai_run_starts_it_too(tmp_path: Path) -> None:
    # `standalone` takes a free port instead of the fixed default.
    standalone = ["--nproc_per_node", "2", "--extra_launch_args", "standalone"]
    launcher = [BIN / "colossalai", "run", *standalone, "tools/main.py"]
    with train(tmp_path, launcher, plugin="zero1", max_training_steps=4) as job:
        output = job.end()
    saved = tmp_path / "checkpoints" / "step_0000004"
    assert checkpoints.damage(saved) is None, output
    assert sorted(path.name for path in saved.glob("optimizer_*")) == [
        "optimizer_00000_of_00002.safetensors",
        "optimizer_00001_of_00002.safetensors",
    ]
