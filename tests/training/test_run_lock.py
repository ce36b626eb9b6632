"""One training at a time in a folder; the other phases may run beside it."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import Job
from runs import arguments, file_size_limit, last_step, small_config

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.saving.run_lock import alone_in_folder

CONFIG = ["-c", "configs/image/digits/speedit.yaml"]


def speedit(phase: str, folder: Path, **changes: Any) -> int:
    return main([*CONFIG, "-p", phase, *arguments(folder, **changes)])


def test_a_second_training_is_refused_while_the_first_lives_and_other_phases_are_not(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "tools/main.py", *CONFIG, "-p", "train"]
    options = {"max_training_steps": 100_000, "log_every": 1, "ckpt_every": 2, "data__num_workers": 1}
    # So that the checkpoint that is sampled from is not removed meanwhile.
    options["keep_last"] = 100_000
    with Job([*command, *arguments(tmp_path, **options)]) as job:
        job.until(lambda: last_step(tmp_path) >= 3)
        config = (tmp_path / "config_train.yaml").read_bytes()
        assert speedit("train", tmp_path, seed=1) == 2
        line = capfd.readouterr().err
        pid = job.process.pid
        holder = rf"process {pid} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\S*"
        wanted = rf"speedit: error: another training is in experiment_dir {tmp_path}: {holder}; wanted"
        assert re.fullmatch(rf"{wanted} another experiment_dir, or wait until it ends\n", line), line
        assert (tmp_path / "config_train.yaml").read_bytes() == config
        assert speedit("sample", tmp_path) == 0
        # Killed, it leaves the file behind, and no lock.
        job.process.send_signal(signal.SIGKILL)
        job.end()
        assert json.loads((tmp_path / "train.lock").read_text())["pid"] == pid
        saved = checkpoints.newest(tmp_path / "checkpoints")
        assert saved is not None
        assert speedit("train", tmp_path, max_training_steps=checkpoints.step_of(saved) + 1) == 0
    assert (tmp_path / "train.lock").read_text() == ""


def test_a_file_system_without_locks_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with alone_in_folder(small_config(tmp_path), Runtime()):
        pass
    said = f"{tmp_path}: its file system has no locks; make sure that no other training writes there\n"
    assert capfd.readouterr().out == said


def test_a_place_that_is_no_folder_to_write_in_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = {
        tmp_path / "file": f"{tmp_path}/file, which is a file",
        tmp_path / "file" / "below": f"{tmp_path}/file/below: Not a directory",
        tmp_path / "broken": f"{tmp_path}/broken, a broken link to {tmp_path}/gone",
        tmp_path / "loop": f"{tmp_path}/loop, a broken link to {tmp_path}/loop",
        Path("/proc/nowhere"): "/proc/nowhere: No such file or directory",
    }
    for place, problem in places.items():
        assert speedit("train", place) == 2
        wanted = f"speedit: error: experiment_dir needs a folder to write in, got {problem}\n"
        assert capfd.readouterr().err == wanted
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_training_takes_its_lock_away_and_no_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lock = tmp_path / "train.lock"
    wrong = {"data__dataset": "{type: ImageFolder, root: nowhere}"}
    assert speedit("train", tmp_path, **wrong) == 2
    assert "nowhere" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []
    # That of an earlier training stays.
    lock.touch()
    assert speedit("train", tmp_path, **wrong) == 2
    assert lock.exists()


def test_a_lock_that_was_taken_away_meanwhile_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lockf, asked = fcntl.lockf, []

    def after_a_refused_training(*given: Any) -> None:
        if not asked:
            (tmp_path / "train.lock").unlink()
        asked.append(given)
        lockf(*given)

    monkeypatch.setattr(fcntl, "lockf", after_a_refused_training)
    with alone_in_folder(small_config(tmp_path), Runtime()):
        held = json.loads((tmp_path / "train.lock").read_text())
    assert (len(asked), held["pid"]) == (2, os.getpid())


def test_a_full_disk_names_the_lock_and_leaves_none(tmp_path: Path) -> None:
    def enter() -> None:
        with alone_in_folder(small_config(tmp_path), Runtime()):
            pass

    with (
        file_size_limit(0),
        pytest.raises(OSError, match=rf"^\[Errno 27\] cannot write {tmp_path}/train.lock: File too large$"),
    ):
        enter()
    enter()


def test_a_run_with_nothing_to_train_leaves_its_config_and_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert speedit("train", tmp_path, max_training_steps=3) == 0
    files = {name: (tmp_path / name).read_bytes() for name in ("config_train.yaml", "environment.json")}
    written = {name: (tmp_path / name).stat().st_mtime_ns for name in files}
    assert speedit("train", tmp_path, max_training_steps=2, experiment_name="other") == 0
    assert "nothing to train: the run is at step 3, max_training_steps 2" in capfd.readouterr().out
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files} == written
