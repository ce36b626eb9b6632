"""Checkpoints that are written while the training goes on."""

import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from held_saves import files, held_back
from processes import Job
from runs import arguments, file_size_limit, small_config, small_trainer

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.checkpoints.background import Background
from speedit_plugins.trainer.checkpoints.best import read_best
from speedit_plugins.trainer.data.workers import DataError
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.periodic import Measured, Periodic
from speedit_plugins.trainer.training.saving import background_saves
from speedit_plugins.trainer.training.trainer import Trainer

VALIDATED = {"validate_every": 1, "keep_best": "val_loss", "data__validation": "Digits"}


@pytest.fixture
def in_flight() -> Iterator[None]:
    """A save stays in flight until somebody waits for it."""
    with held_back():
        yield


def steps(trainer: Trainer, count: int) -> None:
    trainer.engine.model.train()
    for _ in range(count):
        trainer.optimizer_step()


def fit(trainer: Trainer) -> None:
    trainer.fit(SilentTracker(), StopRequest())


def whole(folder: Path) -> list[str]:
    """Names in a run's folder of checkpoints. Every one is a checkpoint that is whole."""
    found = checkpoints.newest_first(folder / "checkpoints")
    assert [checkpoints.damage(path) for path in found] == [None] * len(found)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir() if path.name != "best.json")
    assert sorted(path.name for path in found) == names
    return names


@pytest.mark.parametrize(
    "changes",
    [
        # With all that a policy and an acceleration keep.
        {"diffusion__policy": "{type: loss_second_moment}", "uncertainty": "true"},
        {"optimizer__type": "AdamWScheduleFree", "optimizer__warmup_steps": 0},
        {"ema__type": "power", "ema__sigma_rel": "[0.05, 0.1]"},
        {"ema__type": "none"},
    ],
    ids=["policy", "two_points", "averages", "no_average"],
)
def test_a_save_while_the_training_goes_on_has_the_files_of_one_that_it_waits_for(
    tmp_path: Path, in_flight: None, changes: dict[str, Any]
) -> None:
    waited = small_trainer(tmp_path / "waited", **changes)
    steps(waited, 3)
    expected = files(waited.save())
    trainer = small_trainer(tmp_path / "run", async_save="true", **changes)
    steps(trainer, 3)
    path = trainer.save()
    # Everything that is saved changes before it is written.
    steps(trainer, 2)
    assert not path.exists()
    trainer.saves.wait()
    assert files(path) == expected
    assert trainer.saves.last == path
    # The memory of the first save is used again.
    steps(waited, 2)
    path = trainer.save()
    steps(trainer, 1)
    trainer.saves.wait()
    assert files(path) == files(waited.save())


def test_two_are_never_written_at_once_and_the_best_and_the_newest_are_kept(
    tmp_path: Path, in_flight: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, write = [], checkpoints.save

    def recorded(folder: Path, step: int, *given: Any, **options: Any) -> Path:
        written.append(f"begin {step}")
        path = write(folder, step, *given, **options)
        written.append(f"end {step}")
        return path

    monkeypatch.setattr(checkpoints, "save", recorded)
    found = {}
    for is_async in ("false", "true"):
        written.clear()
        folder = tmp_path / is_async
        options = {"max_training_steps": 9, "ckpt_every": 2, "keep_last": 1, "keep_every": 4, **VALIDATED}
        trainer = small_trainer(folder, async_save=is_async, **options)
        # The lowest value is first at a step that is saved, then at one that is not, then at none.
        values = iter([5.0, 3.0, 2.0, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0])
        own = Periodic("validate_every", 1, lambda _, v=values: Measured(scores={"val_loss": next(v)}))
        trainer.periodic = (own,)
        fit(trainer)
        found[is_async] = (whole(folder), read_best(folder / "checkpoints"), list(written))
        assert trainer.best == read_best(folder / "checkpoints")
    assert found["true"] == found["false"]
    names, best, events = found["true"]
    assert best is not None
    assert (best.step, names) == (3, ["step_0000003", "step_0000004", "step_0000008", "step_0000009"])
    assert events == [f"{event} {step}" for step in (1, 2, 3, 4, 6, 8, 9) for event in ("begin", "end")]


def test_a_failed_save_is_an_error_of_the_next_step_and_names_the_file(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, async_save="true")
    steps(trainer, 1)
    trainer.save()
    steps(trainer, 1)
    trainer.saves.wait()
    with file_size_limit(10_000):
        trainer.save()
        trainer.saves._background.wait()  # type: ignore[attr-defined]  # that of saves in the background
    wanted = (
        r"cannot write checkpoint \S*step_0000002: cannot write \S*model\.safetensors: File too large;"
        r" the last checkpoint is \S*step_0000001"
    )
    with pytest.raises(CheckpointError, match=wanted):
        trainer.optimizer_step()
    # The step does not count, and the run may go on.
    assert trainer.step == 2
    assert whole(tmp_path) == ["step_0000001"]
    steps(trainer, 1)
    trainer.save()
    trainer.saves.wait()
    assert whole(tmp_path) == ["step_0000001", "step_0000003"]


def test_a_failure_of_the_last_save_is_the_end_of_the_training(tmp_path: Path, in_flight: None) -> None:
    trainer = small_trainer(tmp_path, async_save="true", max_training_steps=4, ckpt_every=4)
    with file_size_limit(10_000), pytest.raises(CheckpointError, match="cannot write .*step_0000004"):
        fit(trainer)
    assert whole(tmp_path) == []


def stop(number: signal.Signals, times: int) -> None:
    for _ in range(times):
        os.kill(os.getpid(), number)


def broken() -> None:
    raise DataError("sample 7 is broken")


@pytest.mark.parametrize(
    ("happens", "code", "said", "names"),
    [
        (lambda: None, 0, "trained to step 9", [5, 9]),
        (lambda: stop(signal.SIGTERM, 1), 0, "stopped by SIGTERM after step 7", [5, 7]),
        (
            lambda: stop(signal.SIGINT, 2),
            130,
            r"at step 6; .*_0000005, 1 step since then lost",
            [5],
        ),
        (broken, 2, r"sample 7 is broken; step 6 is saved as .*_0000006", [5, 6]),
    ],
    ids=["end", "one_signal", "two_signals", "broken_sample"],
)
def test_a_training_ends_when_the_save_in_flight_is_whole(
    tmp_path: Path,
    in_flight: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    happens: Any,
    code: int,
    said: str,
    names: list[int],
) -> None:
    make = Trainer.train_step

    def train_step(trainer: Trainer, *given: Any) -> Any:
        if trainer.step == 6:
            assert trainer.saves._background.is_busy  # type: ignore[attr-defined]  # as above
            happens()
        return make(trainer, *given)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    options = arguments(tmp_path, max_training_steps=9, ckpt_every=5, async_save="true")
    assert main(["-c", "configs/image/digits/speedit.yaml", "-p", "train", *options]) == code
    text = "".join(capfd.readouterr())
    assert re.search(said, text), text
    assert whole(tmp_path) == [f"step_{step:07d}" for step in names]


IMPATIENT = """
import signal
from threading import Event
import torch
from speedit_plugins import cli
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints.background import Background
from speedit_plugins.trainer.training.trainer import Trainer

step, wait, is_writing = Trainer.optimizer_step, Background.wait, Event()

def write(*given, **options):
    # Long calls outside Python, as those that write files are.
    while True:
        is_writing.set()
        torch.arange(2.0**22).sort(descending=True)

def pressed(count):
    for _ in range(count):
        signal.raise_signal(signal.SIGINT)

def optimizer_step(trainer, *given):
    if trainer.step == 2 and is_writing.wait():
        pressed(2)
    return step(trainer, *given)

def waiting(background, *given):
    if background.is_busy:
        pressed(1)
    return wait(background, *given)

checkpoints.save, Trainer.optimizer_step, Background.wait = write, optimizer_step, waiting
cli.command()
"""


def test_a_third_signal_does_not_wait_for_the_save_in_flight(tmp_path: Path) -> None:
    options = arguments(tmp_path, max_training_steps=9, ckpt_every=2, async_save="true")
    command = [sys.executable, "-c", IMPATIENT, "-c", "configs/image/digits/speedit.yaml", "-p", "train"]
    with Job([*command, *options]) as job:
        output = job.end()
    assert job.process.returncode == 130, output
    assert "at step 2; there is no checkpoint of this run, so all of it is lost" in output


def test_the_thread_bears_its_name_while_it_writes() -> None:
    background, names = Background("writer"), []
    for _ in range(2):
        background.start(lambda: names.append(threading.current_thread().name))
        background.wait()
        # An idle thread does not keep the command from ending as usual.
        assert "writer" not in {thread.name for thread in threading.enumerate()}
    assert names == ["writer", "writer"]


KILLED = """
import sys
import threading
from pathlib import Path
from runs import small_trainer
from held_saves import files, held_back
from speedit_plugins.trainer.checkpoints import writing
import speedit_plugins.trainer.training.train

background = "speedit_plugins.trainer.training.saving.background_saves"
small_trainer(Path(sys.argv[1]) / "other")
assert background not in sys.modules, "imported without async_save"
trainer = small_trainer(Path(sys.argv[1]), async_save="true")
assert background in sys.modules
trainer.engine.model.train()
trainer.optimizer_step()
trainer.save()
trainer.optimizer_step()
trainer.saves.wait()

def stuck(*given):
    print("in flight", flush=True)
    threading.Event().wait()

writing._write_moments = stuck
trainer.save()
while True:
    trainer.optimizer_step()
"""


def test_a_kill_leaves_no_half_checkpoint_and_the_next_save_removes_what_is_left(tmp_path: Path) -> None:
    support = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with Job([sys.executable, "-c", KILLED, tmp_path], support) as job:
        job.until(lambda: "in flight" in job.output)
        job.process.send_signal(signal.SIGKILL)
        job.end()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step_0000001", "step_0000002.tmp"]
    newest = checkpoints.newest_whole(checkpoints.newest_first(folder))
    assert newest == folder / "step_0000001"
    trainer = small_trainer(tmp_path, async_save="true")
    trainer.restore(newest)
    steps(trainer, 2)
    trainer.save()
    trainer.saves.wait()
    assert whole(tmp_path) == ["step_0000001", "step_0000003"]


def test_a_diverged_run_names_the_checkpoint_that_was_in_flight(tmp_path: Path, in_flight: None) -> None:
    trainer = small_trainer(tmp_path, async_save="true", max_skipped_steps=1)
    steps(trainer, 1)
    path = trainer.save()
    trainer.inputs.encoder.encode = lambda images, _: images * float("nan")  # type: ignore[method-assign]  # for the test
    with pytest.raises(ValueError, match=f"training diverged: .*the last good checkpoint is {path}"):
        trainer.optimizer_step()
    assert whole(tmp_path) == ["step_0000001"]


def test_a_safetensors_that_would_stop_the_training_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background_saves, "version", lambda name: "0.7.0")
    with pytest.raises(ValueError, match=r"async_save: safetensors 0\.7\.0 stops the training .* 0\.8 or"):
        small_trainer(tmp_path, async_save="true")
    # A resumed run may change its mind.
    assert small_config(tmp_path, async_save="false").async_save is False
