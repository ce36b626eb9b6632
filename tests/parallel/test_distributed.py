"""Two real processes: the checks of distributed_checks.py in one launch, and whole jobs that fail or stop."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import distributed_checks
import pytest
from PIL import Image
from runs import arguments

from speedit_plugins.trainer import checkpoint
from speedit_plugins.trainer.logging.tracking import read_metrics

pytest.importorskip("colossalai", reason="needs ColossalAI; make install adds it")
psutil = pytest.importorskip("psutil")

BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]


def launch(command: Sequence[str | Path]) -> subprocess.Popen[str]:
    """Two processes of one thread each, in a process group of their own."""
    return subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # `colossalai run` looks torchrun up.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
    )


def train(folder: Path, launcher: Sequence[str] = TORCHRUN, **changes: Any) -> subprocess.Popen[str]:
    config = ["-c", "configs/image/digits/speedit.yaml", "-p", "train"]
    return launch([*launcher, "tools/main.py", *config, *arguments(folder, **changes)])


def ranks_of(job: subprocess.Popen[str]) -> list[int]:
    """Process ids of a running job's ranks, in rank order."""
    children = psutil.Process(job.pid).children()
    return [child.pid for child in sorted(children, key=lambda child: int(child.environ()["RANK"]))]


def wait_for_step(folder: Path, job: subprocess.Popen[str], step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not any(row["step"] >= step for row in read_metrics(folder)):
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def run_checks(folder: Path, names: Iterable[str]) -> dict[str, list[str]]:
    job = launch([*TORCHRUN, Path(distributed_checks.__file__), folder, *names])
    output = job.communicate(timeout=500)[0]
    assert (folder / "results.json").exists(), output
    found: dict[str, list[str]] = json.loads((folder / "results.json").read_text())
    return found


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
def test_sigterm_to_the_launcher_saves_at_one_step_and_the_next_launch_goes_on(tmp_path: Path) -> None:
    job = train(tmp_path, plugin="zero2", max_training_steps=100_000, log_every=1)
    wait_for_step(tmp_path, job, 2)
    job.send_signal(signal.SIGTERM)
    output = job.communicate(timeout=90)[0]
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", output)
    assert stopped, output
    saved = checkpoint.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert checkpoint.step_of(saved) == int(stopped[1])
    assert checkpoint.damage(saved) is None
    again = train(tmp_path, plugin="ddp", max_training_steps=checkpoint.step_of(saved) + 2)
    output = again.communicate(timeout=120)[0]
    assert again.returncode == 0, output
    assert f"going on from {saved}" in output


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_is_named(tmp_path: Path) -> None:
    job = train(tmp_path, max_training_steps=100_000, log_every=1)
    wait_for_step(tmp_path, job, 2)
    os.kill(ranks_of(job)[1], signal.SIGKILL)
    start = time.monotonic()
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert time.monotonic() - start < 45
    assert re.search(r"Root Cause.*rank +: 1 .*exitcode +: -9", output, re.DOTALL), output


@pytest.mark.slow
def test_a_silent_rank_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    job = train(tmp_path, max_training_steps=100_000, log_every=1, distributed_timeout_seconds=5)
    wait_for_step(tmp_path, job, 2)
    stopped = ranks_of(job)[1]
    os.kill(stopped, signal.SIGSTOP)
    # torchrun gives a process that does not answer its SIGTERM 30 seconds.
    output = job.communicate(timeout=60)[0]
    assert job.returncode != 0
    assert re.search(
        r"speedit: rank 0: lost another process, which says why if it failed: .*[Tt]imed out", output
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
    job = train(tmp_path / "run", max_training_steps=1000, **data)
    output = job.communicate(timeout=120)[0]
    assert job.returncode != 0
    said = re.findall(r"speedit: rank (\d): error: (corrupt image .*5\.png: .*)", output)
    assert len(said) == 1, output
    assert re.search(rf"Root Cause.*rank +: {said[0][0]} .*corrupt image", output, re.DOTALL), output


@pytest.mark.slow
def test_colossalai_run_starts_it_too(tmp_path: Path) -> None:
    launcher = [str(BIN / "colossalai"), "run", "--nproc_per_node", "2", "--master_port", "29517"]
    job = train(tmp_path, launcher, plugin="zero1", max_training_steps=4)
    output = job.communicate(timeout=180)[0]
    saved = tmp_path / "checkpoints" / "step_0000004"
    assert checkpoint.damage(saved) is None, output
    assert sorted(path.name for path in saved.glob("optimizer_*")) == [
        "optimizer_00000_of_00002.safetensors",
        "optimizer_00001_of_00002.safetensors",
    ]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(tmp_path: Path) -> None:
    first = train(tmp_path, max_training_steps=4, ckpt_every=2)
    assert first.wait(timeout=120) == 0, first.communicate()[0]
    newest = tmp_path / "checkpoints" / "step_0000004"
    shard = newest / "optimizer_00001_of_00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    named = train(tmp_path / "other", max_training_steps=6, resume=newest)
    output = named.communicate(timeout=120)[0]
    assert named.returncode != 0
    assert re.search(r"step_0000004 is damaged: optimizer_00001_of_00002.safetensors has \d+ bytes", output)
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
    auto = train(tmp_path, max_training_steps=6)
    output = auto.communicate(timeout=120)[0]
    assert auto.returncode == 0, output
    assert f"checkpoint {newest} is damaged" in output
    assert f"going on from {tmp_path / 'checkpoints' / 'step_0000002'}" in output
