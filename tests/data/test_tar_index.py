"""The index of a tar that is kept between runs: it is used, and never stale."""

import json
import multiprocessing
import os
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tars import encoded, generator, level_of, loaded, old, shards, write

from speedit_plugins.trainer.data.archives.index import indexed
from speedit_plugins.trainer.data.archives.web import WebDataset
from speedit_plugins.trainer.data.identity import differences


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speedit" / "folders"


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars that are read through."""
    found: list[str] = []
    real: Callable[..., tarfile.TarFile] = tarfile.open

    def counted(path: Any, *args: Any, **options: Any) -> tarfile.TarFile:
        found.append(Path(path).name)
        return real(path, *args, **options)

    monkeypatch.setattr(tarfile, "open", counted)
    return found


def test_a_tar_is_read_through_once_and_again_after_a_change(
    tmp_path: Path, cache: Path, scans: list[str]
) -> None:
    path = old(write(tmp_path / "x.tar", ("a.png", encoded(1))))
    scans.clear()
    for _ in range(2):
        assert len(WebDataset(path, image_size=8)) == 1
    assert scans == ["x.tar"]
    old(write(path, ("a.png", encoded(3)), ("b.png", encoded(4))), 1.1e9)
    scans.clear()
    assert [level_of(sample["image"]) for sample in loaded(WebDataset(path, image_size=8))] == [3, 4]
    # The same length at another time counts as a change too.
    os.utime(path, ns=(1, 1))
    WebDataset(path, image_size=8)
    assert scans == ["x.tar"] * 2


def test_a_tar_that_was_just_written_is_not_trusted(tmp_path: Path, cache: Path, scans: list[str]) -> None:
    written = time.time_ns()
    for level in (1, 2):
        path = write(tmp_path / "x.tar", ("a.png", encoded(level)))
        # As by a clock that has not ticked between the two.
        os.utime(path, ns=(written, written))
        scans.clear()
        assert level_of(WebDataset(path, image_size=8).load(0, generator())["image"]) == level
        assert scans == ["x.tar"]


def test_a_damaged_index_is_made_again(tmp_path: Path, cache: Path, scans: list[str]) -> None:
    path = old(write(tmp_path / "x.tar", ("a.png", encoded(1))))
    WebDataset(path, image_size=8)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    for content in (b"", whole[:100], b"no index"):
        kept.write_bytes(content)
        scans.clear()
        assert level_of(WebDataset(path, image_size=8).load(0, generator())["image"]) == 1
        assert scans == ["x.tar"]


def test_json_is_parsed_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"image_size": 8, "class_cond": True, "label_key": "json:label"}
    old(shards(tmp_path / "data", 1) / "000.tar")
    first = WebDataset(tmp_path / "data", **options)
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("read again"))
    assert WebDataset(tmp_path / "data", **options).labels.tolist() == first.labels.tolist()


def test_several_processes_read_through_it_once(tmp_path: Path, cache: Path) -> None:
    path = old(write(tmp_path / "x.tar", ("a.png", encoded(1))))
    context = multiprocessing.get_context("fork")
    barrier, reads = context.Barrier(3), context.Value("i", 0)

    def read() -> None:
        def make() -> dict[str, np.ndarray]:
            with reads:
                reads.value += 1
            return {"number": np.array([7])}

        barrier.wait()
        assert indexed(path, "numbers", make)["number"].tolist() == [7]

    processes = [context.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert ([process.exitcode for process in processes], reads.value) == ([0] * 3, 1)


def test_a_change_of_the_data_is_noticed(tmp_path: Path) -> None:
    def identity(*members: tuple[str, bytes]) -> dict[str, str]:
        return WebDataset(write(tmp_path / "x.tar", *members), image_size=8, class_cond=True).identity()

    before = identity(("a.png", encoded(1)), ("a.cls", b"0"))
    for aspect, members in {
        "names": (("b.png", encoded(1)), ("b.cls", b"0")),
        "classes": (("a.png", encoded(1)), ("a.cls", b"1")),
        "sizes": (("a.png", encoded(1, (32, 32))), ("a.cls", b"0")),
    }.items():
        changes = [change.aspect for change in differences(before, identity(*members))]
        assert aspect in changes
        assert (aspect == "names") == ("names" in changes)
