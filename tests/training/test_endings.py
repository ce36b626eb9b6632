"""Trainings and samplings that end early: what is saved, and the one line that says so."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from runs import arguments, last_step

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.training.trainer import Trainer

CONFIG = ["-c", "configs/image/digits/speedit.yaml"]
# Of 40 images, number 33 is in the eighth batch of two.
SEED = 6


def speedit(phase: str, folder: Path, **changes: Any) -> int:
    return main([*CONFIG, "-p", phase, *arguments(folder, **changes)])


def error_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("speedit: ")]


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Makes something happen at the beginning of the step after this many."""

    def put(step: int, happens: Callable[[], object]) -> None:
        whole = Trainer.optimizer_step

        def optimizer_step(trainer: Trainer, *given: Any) -> Any:
            if trainer.step == step:
                happens()
            return whole(trainer, *given)

        monkeypatch.setattr(Trainer, "optimizer_step", optimizer_step)

    return put


def twice(number: signal.Signals) -> Callable[[], None]:
    def happens() -> None:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)

    return happens


def test_a_second_signal_says_what_is_lost_and_where_the_last_checkpoint_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], at_step: Callable[..., None]
) -> None:
    at_step(7, twice(signal.SIGINT))
    assert speedit("train", tmp_path / "a", ckpt_every=5) == 130
    saved = tmp_path / "a" / "checkpoints" / "step_0000005"
    (line,) = error_lines(capfd.readouterr().err)
    wanted = f"speedit: interrupted at step 7; the last checkpoint is {saved}, 2 steps since then lost"
    assert line == wanted
    at_step(3, twice(signal.SIGTERM))
    assert speedit("train", tmp_path / "b") == 143
    (line,) = error_lines(capfd.readouterr().err)
    wanted = "speedit: interrupted at step 3; there is no checkpoint of this run, so all of it is lost"
    assert line == wanted
    # The run is not locked, and goes on.
    assert speedit("train", tmp_path / "a", max_training_steps=6) == 0


@pytest.fixture
def pictures(tmp_path: Path) -> dict[str, Any]:
    """Options of a training on 40 images. One of them is broken."""
    folder = tmp_path / "images"
    (folder / "cat").mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (8, 8), (number * 6, 0, 0)).save(folder / "cat" / f"{number:02d}.png")
    broken = folder / "cat" / "33.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return {
        "data__dataset": f"{{type: ImageFolder, root: {folder}}}",
        "encoder": "{type: Pixels, channels: 3}",
        "model__in_channels": 3,
        "data__batch_size": 2,
        "ckpt_every": 5,
    }


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_sample_ends_the_run_after_a_checkpoint_of_the_last_whole_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], pictures: dict[str, Any], num_workers: int
) -> None:
    pictures |= {"data__num_workers": num_workers, "optimizer__grad_accumulation": 3}
    # The seed puts the broken image into the second batch of the third step.
    assert speedit("train", tmp_path / "run", seed=SEED, **pictures) == 2
    (line,) = error_lines(capfd.readouterr().err)
    saved = checkpoints.newest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert re.fullmatch(rf"speedit: error: corrupt image \S+33\.png: .*; step 2 is saved as {saved}", line), (
        line
    )
    state = checkpoints.load(saved).state
    # The position of a whole step: two steps of three batches of two samples.
    assert (state["step"], state["loader"]["epoch"], state["loader"]["offset"]) == (2, 0, 12)
    # Once the image is whole, the run goes on to where it would have come.
    Image.new("RGB", (8, 8), (33 * 6, 0, 0)).save(tmp_path / "images" / "cat" / "33.png")
    assert speedit("train", tmp_path / "run", seed=SEED, max_training_steps=4, **pictures) == 0
    assert speedit("train", tmp_path / "whole", seed=SEED, max_training_steps=4, **pictures) == 0
    of = [checkpoints.load(tmp_path / name / "checkpoints" / "step_0000004") for name in ("run", "whole")]
    assert all((of[0].model[name] == of[1].model[name]).all() for name in of[0].model)


def test_a_checkpoint_folder_that_disappears_comes_back_with_the_next_save(
    tmp_path: Path, at_step: Callable[..., None]
) -> None:
    folder = tmp_path / "checkpoints"
    at_step(6, lambda: folder.rename(tmp_path / "moved"))
    assert speedit("train", tmp_path, ckpt_every=5, max_training_steps=8) == 0
    assert [path.name for path in folder.iterdir()] == ["step_0000008"]


def test_a_signal_in_inference_says_how_far_it_was_and_leaves_no_half_set(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert speedit("train", tmp_path, max_training_steps=1) == 0
    whole, done = images.save, []

    def save(*given: Any, **options: Any) -> None:
        whole(*given, **options)
        done.append(given)
        if len(done) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(images, "save", save)
    capfd.readouterr()
    assert speedit("inference", tmp_path, num_samples=8, per_proc_batch_size=4) == 143
    (line,) = error_lines(capfd.readouterr().err)
    assert line == "speedit: interrupted after 4 of 8 images; none of them is kept"
    assert list((tmp_path / "inference").iterdir()) == []
    # What a killed one left is drawn again; what another one draws is left alone.
    partial = tmp_path / "inference" / "step_0000001_ddpm4_n8_cfg1_seed0.tmp"
    partial.mkdir()
    (partial / "000099.png").write_text("left")
    lock = "fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX)"
    code = f"import fcntl, os, sys; {lock}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code, partial], stdin=-1, stdout=-1) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert speedit("inference", tmp_path, num_samples=8, per_proc_batch_size=4) == 2
        (line,) = error_lines(capfd.readouterr().err)
        assert line.startswith(f"speedit: error: another inference is writing {partial}; wanted")
        assert (partial / "000099.png").exists()
        other.kill()
    assert speedit("inference", tmp_path, num_samples=8, per_proc_batch_size=4) == 0
    assert len(list(partial.with_suffix("").glob("*.png"))) == 8


@contextmanager
def started(folder: Path, out: int, *, terminal: int | None = None, **changes: Any) -> Iterator[Any]:
    """A training that writes to `out`, with `terminal` as its controlling one; killed at the end."""
    command = [sys.executable, "tools/main.py", *CONFIG, "-p", "train", *arguments(folder, **changes)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL if terminal is None else terminal,
        stdout=out,
        stderr=out,
        start_new_session=True,
        preexec_fn=None if terminal is None else lambda: os.close(os.open(os.ttyname(terminal), os.O_RDWR)),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], bool], process: Any) -> None:
    while not condition():
        assert process.poll() is None, "the training ended early"
        time.sleep(0.02)


def test_a_terminal_or_pipe_that_is_gone_does_not_end_a_training(tmp_path: Path) -> None:
    for name, ends in (("pipe", os.pipe()), ("pty", pty.openpty())):
        folder = tmp_path / name
        with started(folder, ends[1], max_training_steps=400, log_every=1) as process:
            os.close(ends[1])
            until(lambda folder=folder: last_step(folder) >= 2, process)  # type: ignore[misc]  # of this turn
            os.close(ends[0])
            assert process.wait() == 0
        assert (folder / "checkpoints" / "step_0000400").is_dir()
        assert (folder / "loss.png").is_file()


def test_a_terminal_that_closes_saves_the_training_and_ends_it(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with started(tmp_path, theirs, terminal=theirs, max_training_steps=100_000, log_every=1) as process:
        os.close(theirs)
        until(lambda: last_step(tmp_path) >= 2, process)
        os.close(ours)
        assert process.wait() == 0
    saved = checkpoints.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert checkpoints.damage(saved) is None
    assert checkpoints.step_of(saved) >= 2


def test_a_killed_loading_process_ends_the_run_after_a_checkpoint(tmp_path: Path) -> None:
    read, write = os.pipe()
    options = {"max_training_steps": 100_000, "log_every": 1, "data__num_workers": 2}
    with started(tmp_path, write, **options) as process:
        os.close(write)
        until(lambda: last_step(tmp_path) >= 2, process)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        loading = [int(child) for child in children if is_loading(int(child))]
        os.kill(loading[0], signal.SIGKILL)
        with os.fdopen(read, errors="replace") as output:
            text = output.read()
        assert process.wait() == 2, text
    (line,) = error_lines(text)
    assert re.fullmatch(
        rf"speedit: error: loading process \d \(pid {loading[0]}\) was killed by SIGKILL, usually because the"
        rf" memory of the machine is full; .*; step (\d+) is saved as {tmp_path}/checkpoints/step_\d+",
        line,
    ), line
    assert "Traceback" not in text
    saved = checkpoints.newest(tmp_path / "checkpoints")
    assert saved is not None
    assert checkpoints.damage(saved) is None
    assert checkpoints.step_of(saved) >= 2


def is_loading(process_id: int) -> bool:
    """Whether it is a fork of the training: it has the same command line. torch has other children too."""
    return b"max_training_steps" in Path(f"/proc/{process_id}/cmdline").read_bytes()
