"""What a resumed run says about data that changed since its checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.identity import differences, identify, portable
from speedit_plugins.trainer.data.images.captions import ImageCaptions
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.loader import ResumableLoader

NUM_IMAGES = 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of three images, each with a caption beside it."""
    for number in range(NUM_IMAGES):
        path = tmp_path / "data" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"number {number}")
        os.utime(path, (1e9, 1e9))
    return tmp_path / "data"


def loader(root: Path, kind: Any = ImageFolder, **options: Any) -> ResumableLoader:
    return ResumableLoader(kind(root=root, image_size=8), batch_size=2, **options)


def saved(root: Path, kind: Any = ImageFolder) -> dict[str, Any]:
    """The position after one of three batches."""
    running = loader(root, kind)
    next(running)
    return running.state_dict()


def test_unchanged_data_moved_as_a_whole_go_on_without_a_word(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    running = loader(root)
    next(running)
    state, expected = running.state_dict(), next(running)
    shutil.move(root, root.with_name("moved"))
    moved = loader(root.with_name("moved"))
    moved.load_state_dict(state)
    assert torch.equal(next(moved)["image"], expected["image"])
    assert capsys.readouterr().out == ""


def test_another_order_or_meaning_of_the_data_is_refused_or_starts_an_epoch(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = saved(root)
    # The number stays.
    (root / "a" / "2.png").rename(root / "b" / "2.png")
    message = r"other data: the names differ \(3 of 6, the first is sample 1, a/4.png\)\. data.accept_changed"
    changed = loader(root)
    with pytest.raises(ValueError, match=message):
        changed.load_state_dict(state)
    assert changed.state_dict()["offset"] == 0
    (root / "a" / "6.png").write_bytes((root / "a" / "0.png").read_bytes())
    with pytest.raises(ValueError, match="other data: there were 6 samples and are 7; the names differ"):
        loader(root).load_state_dict(state)
    willing = loader(root, accept_changed=True)
    willing.load_state_dict(state)
    assert "the names differ (" in (said := capsys.readouterr().out)
    assert "going on with epoch 1" in said
    assert (willing.epoch, willing.state_dict()["offset"]) == (1, 0)
    shutil.move(root / "b", root / "c")
    with pytest.raises(ValueError, match="the classes differ"):
        loader(root).load_state_dict(willing.state_dict())


@pytest.mark.parametrize("kind", [ImageFolder, ImageCaptions])
def test_edited_pixels_are_said(root: Path, kind: Any, capsys: pytest.CaptureFixture[str]) -> None:
    state = saved(root, kind)
    Image.new("RGB", (80, 8), "red").save(root / "b" / "3.png")
    running = loader(root, kind)
    running.load_state_dict(state)
    said = capsys.readouterr().out.splitlines()
    changed = [
        f"the data changed since the checkpoint: files {what}" for what in ("have other", "were written")
    ]
    assert [line.startswith(start) for line, start in zip(said, changed, strict=True)] == [True] * 2
    assert all(line.endswith("(1 of 6, the first is sample 4, b/3.png)") for line in said)
    assert running.state_dict()["offset"] == 2
    # Only rank 0 prints.
    quiet = loader(root, kind, rank=1, world_size=2)
    quiet.load_state_dict(state)
    assert capsys.readouterr().out == ""


def test_an_edited_caption_is_said(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = saved(root, ImageCaptions)
    (root / "a" / "4.txt").write_text("number four")
    running = loader(root, ImageCaptions)
    running.load_state_dict(state)
    wanted = (
        "the data changed since the checkpoint: the captions differ (1 of 6, the first is sample 2, a/4.png)"
    )
    assert capsys.readouterr().out.splitlines() == [wanted]


def test_a_checkpoint_without_an_identity_goes_on_with_a_line(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = saved(root)
    del state["identity"]
    running = loader(root)
    running.load_state_dict(state)
    assert running.state_dict()["offset"] == 2
    assert "the checkpoint does not say what data it has seen: only the number" in capsys.readouterr().out


@pytest.mark.parametrize("config", ["Digits", {"type": "Emoji", "split": "test"}, "MovingDigits"])
def test_embedded_data_have_a_constant(config: Any) -> None:
    first, second = (build(DATASETS, config).identity() for _ in range(2))
    assert first == second
    assert set(first) == {"contents"}
    assert first != build(DATASETS, {"type": "Emoji", "split": "train"}).identity()


def test_a_table_of_absolute_paths_may_be_moved_with_its_images(root: Path) -> None:
    listed = root.with_name("lists") / "table.csv"
    listed.parent.mkdir()
    states = []
    for place in (root, root.with_name("moved")):
        rows = "".join(f"{place}/{name},red\n" for name in ("a/0.png", "b/3.png"))
        listed.write_text(f"path,text\n{rows}")
        states.append(ImageCaptions(listed, image_size=8).identity())
        shutil.move(place, root.with_name("moved")) if place == root else None
    assert differences(*states) == []
    assert portable(Path("/data"), ["/data/a.png", "/b/c.png", "/b/d/e.png"]) == ["a.png", "c.png", "d/e.png"]


@pytest.mark.parametrize("is_listed", [True, False])
def test_videos_have_an_identity(tmp_path: Path, is_listed: bool) -> None:
    for name in ("ant/0/0.png", "ant/1/0.png", "bee/2/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    rows = "ant/0,x\nant/1,y\nbee/2,z\n"
    config: dict[str, Any] = {"type": "VideoFolder", "root": str(tmp_path), "image_size": 8, "num_frames": 1}
    if is_listed:
        (tmp_path / "t.csv").write_text(f"path,text\n{rows}")
        config |= {"type": "VideoTable", "table": str(tmp_path / "t.csv")}
    first = build(DATASETS, config)
    os.utime(tmp_path / "ant" / "1", (1e9, 1e9))
    if is_listed:
        (tmp_path / "t.csv").write_text(f"path,text\n{rows.replace('z', 'edited')}")
    before, dataset = first.identity(), build(DATASETS, config)
    os.utime(tmp_path / "ant" / "1")
    found = {change.aspect: change.text for change in differences(before, dataset.identity(), dataset)}
    assert found["times"] == "files were written again (1 of 3, the first is sample 1, ant/1)"
    assert set(found) == ({"times", "captions"} if is_listed else {"times"})


def test_a_change_among_many_samples_is_placed_within_its_block() -> None:
    names = [f"{number}.png" for number in range(1000)]  # more than 256 blocks of 2: blocks of 4
    changed = [*names[:501], "x.png", *names[502:]]
    (change,) = differences(identify(names=names), identify(names=changed))
    assert change.text == "the names differ (1 of 250 blocks of 4, the first is samples 500 to 503)"
    assert differences(identify(names=names), identify(names=list(names))) == []
    # The texts ["ab", "c"] and ["a", "bc"] have the same bytes.
    assert differences(identify(names=["ab", "c"]), identify(names=["a", "bc"]))
