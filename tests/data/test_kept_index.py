"""The index of a large folder that is kept between runs: it is used, and never stale."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from speedit_plugins.trainer.data import kept, listing
from speedit_plugins.trainer.data.folders import Walk
from speedit_plugins.trainer.data.images import caption_folders, folder
from speedit_plugins.trainer.data.images.captions import ImageCaptions
from speedit_plugins.trainer.data.images.folder import ImageFolder

BUCKETS = [[8, 8], [8, 16]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keeps an index of every folder, however small."""
    monkeypatch.setattr(listing, "KEPT_FROM", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "speedit" / "folders"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of two square images each, with captions, all written long ago."""
    for number in range(4):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"number {number}")
    age(tmp_path / "data")
    return tmp_path / "data"


def age(root: Path, seconds: float = 1e9) -> None:
    """Sets the time of everything: an index does not trust what changed just before it was made."""
    for path in (root, *root.rglob("*")):
        os.utime(path, (seconds, seconds))


def images(root: Path) -> ImageFolder:
    return ImageFolder(root, image_size=8, buckets=BUCKETS)


def captions(root: Path) -> list[str]:
    data = ImageCaptions(root=root, image_size=8)
    return [data.load(index, torch.Generator())["caption"] for index in range(len(data))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders, headers and texts that are read from here on."""
    seen: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            seen.append(os.path.basename(str(given[-1])))
            return function(*given)

        return call

    monkeypatch.setattr(Walk, "entries", counted(Walk.entries))
    monkeypatch.setattr(folder, "read_size", counted(folder.read_size))
    monkeypatch.setattr(caption_folders, "_text", counted(caption_folders._text))
    return seen


def test_the_second_start_reads_nothing_and_finds_the_same(root: Path, cache: Path, reads: list[str]) -> None:
    (root / "a" / "left.out").touch()
    age(root)
    first = images(root)
    assert sorted(reads) == ["0.png", "1.png", "2.png", "3.png", "a", "b", "data"]
    assert captions(root) == ["number 0", "number 2", "number 1", "number 3"]
    reads.clear()
    second = images(root)
    assert reads == []
    assert second.identity() == first.identity()
    assert torch.equal(second.buckets, first.buckets)
    assert (second.classes, second.left_out) == (first.classes, {".out": 1, ".txt": 4})
    assert captions(root) == ["number 0", "number 2", "number 1", "number 3"]
    assert reads == []


def test_a_change_of_the_folder_is_seen_and_only_new_files_are_read(
    root: Path, cache: Path, reads: list[str]
) -> None:
    images(root)
    reads.clear()
    Image.new("RGB", (16, 8)).save(root / "a" / "4.png")
    (root / "b" / "1.png").unlink()
    data = images(root)
    assert [data.name(index) for index in range(len(data))] == ["a/0.png", "a/2.png", "a/4.png", "b/3.png"]
    assert data.buckets is not None
    assert data.buckets.tolist() == [0, 0, 1, 0]
    assert sorted(reads) == ["4.png", "a", "b", "data"]
    (root / "c").mkdir()
    with pytest.raises(ValueError, match="class folder .*c has no images"):
        images(root)


def test_a_file_edited_in_place_is_read_again(root: Path, cache: Path, reads: list[str]) -> None:
    images(root)
    captions(root)
    reads.clear()
    # The folder's own time stays.
    (root / "b" / "1.txt").write_text("edited 1")
    assert captions(root) == ["number 0", "number 2", "edited 1", "number 3"]
    Image.new("RGB", (16, 8)).save(root / "a" / "0.png")
    data = images(root)
    assert data.buckets is not None
    assert data.buckets.tolist() == [1, 0, 0, 0]
    assert reads == ["1.txt", "0.png"]


def test_what_changed_just_before_the_index_was_made_is_read_again(
    root: Path, cache: Path, reads: list[str]
) -> None:
    # As on a file system whose clock ticks every second: the change after this one would have the same time.
    os.utime(root / "a")
    os.utime(root / "b" / "3.png")
    images(root)
    reads.clear()
    images(root)
    assert sorted(reads) == ["3.png", "a", "b", "data"]


def test_a_damaged_or_unwritable_index_costs_time_only(
    root: Path, cache: Path, reads: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    expected = images(root).identity()
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    reads.clear()
    assert images(root).identity() == expected
    assert len(reads) == 7
    for file in cache.iterdir():
        file.unlink()
    cache.rmdir()
    cache.write_text("a file in the folder's place")
    assert capsys.readouterr().out == ""
    assert images(root).identity() == expected
    assert "no index of the data is kept for the next start: " in capsys.readouterr().out


def test_each_folder_and_way_to_read_it_has_its_own_index(root: Path, cache: Path, tmp_path: Path) -> None:
    images(root)
    other = tmp_path / "other"
    root.rename(other)
    Image.new("RGB", (16, 8)).save(other / "a" / "5.png")
    assert len(images(other)) == 5
    # The index says which key it belongs to, should two names ever have one hash.
    file = next(cache.iterdir())
    kept.save("a key", {})
    kept._path("a key").rename(kept._path("another key"))
    assert file.exists()
    assert kept.load("another key") is None


def test_two_lists_of_images_in_one_folder_do_not_drive_out_each_other(
    root: Path, cache: Path, reads: list[str]
) -> None:
    for name, listed in (("train", "a/0.png"), ("test", "b/1.png")):
        root.with_name(f"{name}.csv").write_text(f"path,text\n{listed},red\n")
    for _ in range(2):
        for name in ("train", "test"):
            ImageCaptions(root.with_name(f"{name}.csv"), root=root, image_size=8, buckets=BUCKETS)
    assert reads == ["0.png", "1.png"]


def test_small_folders_keep_no_index(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "KEPT_FROM", 10_000)
    images(root)
    captions(root)
    assert not cache.exists()


def test_partial_files_of_killed_processes_are_removed_once_they_are_old(cache: Path) -> None:
    kept.save("first", {"a": np.arange(3)})
    (entry,) = cache.iterdir()
    left = [cache / f"{entry.stem}.{name}" for name in ("4711", "4711.tmp", f"{'0f' * 16}.tmp")]
    others = [entry, cache / "notes.txt", cache / "x.1234.tmp"]
    for path in (*left, *others):
        path.touch()
        os.utime(path, (1e9, 1e9))
    young = cache / f"{entry.stem}.4712.tmp"
    young.touch()
    kept.save("second", {"a": np.arange(4)})
    (second,) = set(cache.iterdir()) - {*others, young}
    assert second.suffix == ".npz"
    # The entries are whole.
    assert [kept.load(key)["a"].tolist() for key in ("first", "second")] == [[0, 1, 2], [0, 1, 2, 3]]  # type: ignore[index]  # None fails the test
