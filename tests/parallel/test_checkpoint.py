import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import file_size_limit
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError, Contents, writing
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.parallel.saved_moments import Moments


def contents(value: float = 1.0, size: int = 8) -> Contents:
    weights = {"a": torch.full((size,), value), "b": torch.arange(6.0).reshape(2, 3).T}
    return Contents(
        model=weights,
        ema={k: v + 1 for k, v in weights.items()},
        state={"step": 3},
        config="seed: 0\n",
        moments={"exp_avg/a": Slice(0, torch.full((size,), value / 2)), "step/a": Slice(0, torch.ones(1))},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 100, contents(), keep_last=3)
    loaded = checkpoints.load(path)
    assert path.name == "step_0000100"
    assert_close(dict(loaded.model), dict(contents().model), rtol=0, atol=0)
    assert_close(dict(loaded.ema), dict(contents().ema), rtol=0, atol=0)
    assert loaded.state == {"step": 3}
    assert loaded.config == "seed: 0\n"
    assert sorted(loaded.moments) == ["exp_avg/a", "step/a"]
    assert_close(loaded.moments["exp_avg/a"], torch.full((8,), 0.5), rtol=0, atol=0)
    assert checkpoints.damage(path) is None


def test_who_reads_the_averaged_weights_alone_looks_at_their_file_alone(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 100, contents(), keep_last=3)
    (path / checkpoints.MODEL).write_bytes(b"cut")
    assert checkpoints.damage(path) is not None
    assert checkpoints.newest_whole([path], only=checkpoints.EMA) == path
    (path / checkpoints.EMA).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="every checkpoint of the run is damaged"):
        checkpoints.newest_whole([path], only=checkpoints.EMA)


def test_the_newest_by_step_is_found_and_older_ones_are_removed(tmp_path: Path) -> None:
    for step in (5, 20, 100, 10_000_000):
        checkpoints.save(tmp_path, step, contents(), keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000100", "step_10000000"]
    newest = checkpoints.newest(tmp_path)
    assert newest is not None
    assert checkpoints.step_of(newest) == 10_000_000
    assert checkpoints.newest(tmp_path / "absent") is None


def test_multiples_of_keep_every_stay(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        checkpoints.save(tmp_path, step, contents(), keep_last=1, keep_every=30)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000030", "step_0000060", "step_0000070"]


def test_moments_of_several_ranks_are_put_together_where_they_belong(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 1, contents(), keep_last=1)
    # Files as two ranks write them; the second has one element less.
    for rank, values in ((0, [0.0, 1.0, 2.0]), (1, [3.0, 4.0])):
        moments = {"exp_avg/a": Slice(3 * rank, torch.tensor(values)), "step/a": Slice(0, torch.ones(1))}
        part = Contents({}, {}, {}, "", moments)
        writing._write_moments(path, part, Runtime(rank=rank, world_size=2))
    (path / "optimizer_00000_of_00001.safetensors").unlink()
    whole = Moments(path)
    assert whole["exp_avg/a"].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert whole["step/a"].tolist() == [1.0]


def test_a_run_that_passed_over_a_damaged_checkpoint_keeps_what_it_saves(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 20, contents(), keep_last=3)
    damaged = checkpoints.save(tmp_path, 40, contents(), keep_last=3)
    (damaged / checkpoints.EMA).write_bytes(b"")
    # The run resumed from step 20 and stopped before step 40.
    path = checkpoints.save(tmp_path, 25, contents(), keep_last=1)
    assert checkpoints.newest_whole(checkpoints.newest_first(tmp_path)) == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_0000025", "step_0000040.damaged"]
    # The same once more: old ones are still removed, and nothing that was set aside is lost.
    checkpoints.save(tmp_path, 40, contents(), keep_last=3)
    checkpoints.save(tmp_path, 30, contents(), keep_last=1)
    names = ["step_0000030", "step_0000040.damaged", "step_0000040.damaged1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


MOMENTS = "optimizer_00000_of_00001.safetensors"
FILES = (checkpoints.MODEL, checkpoints.EMA, checkpoints.STATE, checkpoints.CONFIG, checkpoints.MANIFEST)


@pytest.mark.parametrize("name", [*FILES, "optimizer_00000_of_00001.safetensors"])
@pytest.mark.parametrize("kind", ["cut", "flipped", "absent"])
def test_any_damage_to_any_file_is_found_and_an_earlier_checkpoint_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    good = checkpoints.save(tmp_path, 1, contents(), keep_last=3)
    path = checkpoints.save(tmp_path, 2, contents(), keep_last=3)
    file = path / name
    data = bytearray(file.read_bytes())
    if kind == "absent":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    reason = checkpoints.damage(path)
    assert reason is not None
    assert name in reason or name == checkpoints.MANIFEST
    assert checkpoints.newest_whole(checkpoints.newest_first(tmp_path)) == good
    assert f"checkpoint {path} is damaged: {reason}; looking for an earlier one" in capsys.readouterr().out
    damaged_too = good / checkpoints.EMA
    damaged_too.write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=f"every checkpoint of the run is damaged, the newest is {path}"
    ):
        checkpoints.newest_whole(checkpoints.newest_first(tmp_path))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda manifest: manifest.update(files={}), "does not list config.yaml, ema.safetensors"),
        (lambda manifest: manifest["files"].pop(checkpoints.EMA), "does not list ema.safetensors"),
        (lambda manifest: manifest["files"].pop(MOMENTS), f"does not list {MOMENTS}"),
        (lambda manifest: manifest.update(step=1), "has step 1, wanted 2"),
        (lambda manifest: manifest.update(step="2"), "has step '2', wanted 2"),
        (lambda manifest: manifest.pop("step"), "is not readable: KeyError"),
        (lambda manifest: manifest.update(files=[]), "does not list config.yaml"),
        (lambda manifest: manifest.update(files=None), "is not readable: TypeError"),
        (lambda manifest: rename(manifest, "../step_0000001/state.pt"), "lists '../step_0000001/state.pt'"),
        (lambda manifest: rename(manifest, "/etc/hostname"), "lists '/etc/hostname', which is no file of a"),
        (lambda manifest: rename(manifest, "notes.txt"), "lists 'notes.txt', which is no file of a"),
        (
            lambda manifest: rename(manifest, "optimizer_00000_of_00002.safetensors"),
            "lists 2 files of optimizer moments, of 1",
        ),
    ],
)
def test_a_manifest_that_cannot_be_the_checkpoints_is_damage(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    good = checkpoints.save(tmp_path, 1, contents(), keep_last=3)
    path = checkpoints.save(tmp_path, 2, contents(), keep_last=3)
    manifest = json.loads((path / checkpoints.MANIFEST).read_text())
    change(manifest)
    (path / checkpoints.MANIFEST).write_text(json.dumps(manifest))
    for only in (None, checkpoints.EMA):
        assert (checkpoints.damage(path, only=only) or "").startswith(f"manifest.json {reason}")
        assert checkpoints.newest_whole(checkpoints.newest_first(tmp_path), only=only) == good


def rename(manifest: dict[str, Any], name: str) -> None:
    """Lists a file of the manifest under another name, with the size and hash that it has."""
    files = manifest["files"]
    files[name] = files[checkpoints.STATE]


def test_the_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        path = checkpoints.save(tmp_path, 1, contents(), keep_last=1)
    finally:
        os.umask(before)
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == dict.fromkeys(
        [*FILES, MOMENTS], 0o644
    )


def test_unfinished_and_removed_folders_are_not_checkpoints(tmp_path: Path) -> None:
    for name in ("step_0000009.tmp", "step_0000008.old", "step_9", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoints.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match="named step_<number>, got .*notes"):
        checkpoints.step_of(tmp_path / "notes")


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, contents(1.0), keep_last=1)
    checkpoints.save(tmp_path, 1, contents(2.0), keep_last=1)
    assert checkpoints.load(tmp_path / "step_0000001").model["a"][0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001"]


@pytest.mark.parametrize("limit", [64, 6_000, 12_000], ids=["model", "ema", "state"])
def test_a_full_disk_is_one_error_and_leaves_the_previous_checkpoint(tmp_path: Path, limit: int) -> None:
    checkpoints.save(tmp_path, 1, contents(1.0, size=1000), keep_last=3)
    big = contents(2.0, size=1000)
    state = {"moments": torch.zeros(10_000)}
    with (
        file_size_limit(limit),
        pytest.raises(
            CheckpointError,
            match=r"cannot write checkpoint .*step_0000002.*last checkpoint is .*step_0000001",
        ),
    ):
        checkpoints.save(tmp_path, 2, Contents(big.model, big.ema, state, big.config), keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001"]
    assert checkpoints.load(tmp_path / "step_0000001").model["a"][0] == 1.0


def test_an_unwritable_place_is_one_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*there is no earlier checkpoint"):
        checkpoints.save(blocked / "checkpoints", 1, contents(), keep_last=1)


def test_a_read_only_folder_is_one_error(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, 1, contents(), keep_last=1)
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write into read-only folders")
        with pytest.raises(CheckpointError, match=os.strerror(errno.EACCES)):
            checkpoints.save(tmp_path, 2, contents(), keep_last=1)
    finally:
        tmp_path.chmod(stat.S_IRWXU)
    assert checkpoints.newest(tmp_path) == tmp_path / "step_0000001"


@pytest.mark.parametrize("name", [checkpoints.MODEL, checkpoints.EMA, checkpoints.STATE])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    path = checkpoints.save(tmp_path, 1, contents(), keep_last=1)
    damaged = path / name
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=rf"checkpoint {path} is damaged"):
        checkpoints.load(path)


def test_a_missing_file_or_folder_is_named(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, 1, contents(), keep_last=1)
    (path / checkpoints.EMA).unlink()
    with pytest.raises(CheckpointError, match=r"step_0000001 lacks ema\.safetensors"):
        checkpoints.load(path)
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        checkpoints.load(tmp_path / "absent")


def test_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, ("true",)

    path = checkpoints.save(tmp_path, 1, contents(), keep_last=1)
    torch.save({"step": Evil()}, path / checkpoints.STATE)
    with pytest.raises(CheckpointError, match="is damaged: UnpicklingError"):
        checkpoints.load(path)
