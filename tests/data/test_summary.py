from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, small_config

from speedit_plugins.cli import main
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.buckets import whole_batches
from speedit_plugins.trainer.data.summary import data_lines, skipped_line
from speedit_plugins.trainer.training.dry_run import describe


class Sized(SimpleNamespace):
    """A dataset of `size` samples with any other attributes."""

    def __len__(self) -> int:
        return int(self.size)


def lines(
    size: int, *, batch_size: int = 4, accumulation: int = 1, shapes: Any = None, **attributes: Any
) -> dict[str, str]:
    data = Sized(size=size, **attributes)
    return dict(data_lines(data, batch_size=batch_size, accumulation=accumulation, shapes=shapes))


def test_a_dataset_with_a_length_alone_is_counted() -> None:
    assert lines(1030) == {"samples": "1,030", "steps per epoch": "257 of 4 samples; 2 samples left over"}


def test_classes_and_captions_are_counted_and_the_first_are_named() -> None:
    names = tuple(f"name {number}" for number in range(1000))
    found = lines(8, classes=names, num_classes=1000, num_captions=8)
    assert found["classes"] == f"1,000 ({', '.join(names[:6])}, and 994 more)"
    assert found["captions"] == "8"
    assert lines(8, num_classes=10)["classes"] == "10"
    untrained = dict(data_lines(Sized(size=8, num_classes=4), batch_size=4, num_classes=6))["never trained"]
    assert untrained == "2 of num_classes: 6, which have no data"
    without = dict(data_lines(Sized(size=8, num_classes=4), batch_size=4, num_classes=0))
    assert without["classes"] == "none, with num_classes: 0; the data have 4"
    assert lines(8, captions=["a", "b"])["captions"] == "2"
    assert lines(8, max_captions=5)["captions"] == "8 samples with up to 5"
    assert sorted(lines(8, classes=(), num_classes=0, captions=None, left_out={})) == [
        "samples",
        "steps per epoch",
    ]


def test_steps_count_batches_over_accumulation() -> None:
    assert lines(24, accumulation=3)["steps per epoch"] == "2 of 4 samples x 3"
    assert lines(20, accumulation=2)["steps per epoch"] == "2.50 of 4 samples x 2"
    assert lines(3)["steps per epoch"] == "0 of 4 samples; a batch needs 4, 3 are there"


def test_buckets_smaller_than_a_batch_are_named_and_never_drawn() -> None:
    buckets = torch.tensor([0] * 3 + [1] * 10 + [3] * 4 + [4])
    shapes = [[8, 8], [8, 16], [16, 8], [4, 8], [8, 4]]
    found = lines(18, buckets=buckets, shapes=shapes)
    assert found["buckets"] == "8 x 16 (10), 4 x 8 (4), 8 x 8 (3), 8 x 4 (1)"
    assert found["never drawn"] == "2 buckets with fewer samples than a batch (4): 8 x 8 (3), 8 x 4 (1)"
    # Two batches of the second bucket and one of the fourth: what the loader draws.
    drawn = whole_batches(torch.arange(18), buckets, batch_size=4)
    assert found["steps per epoch"] == "3 of 4 samples; 6 samples left over"
    assert (len(drawn), set(buckets[drawn].tolist())) == (12, {1, 3})
    assert "never drawn" not in lines(18, buckets=torch.zeros(18, dtype=torch.int64))


def test_what_is_left_out_is_named_with_its_number() -> None:
    found = lines(8, left_out={"no caption": 1200, "other suffixes": 0, ".txt": 3})
    assert found["left out"] == "no caption (1,200), .txt (3)"


def test_damaged_samples_are_counted_at_the_end() -> None:
    assert skipped_line([None]) is None
    assert skipped_line([0, 0]) is None
    assert skipped_line([3]) == "skipped 3 damaged samples; others were used instead"
    assert skipped_line([1, 3, None]) == "skipped at least 3 damaged samples; others were used instead"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images in two classes, one of them damaged; three are wide."""
    generator = np.random.default_rng(0)
    for number in range(20):
        path = tmp_path / "photos" / ("cat", "dog")[number % 2] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sides = (8, 16) if number < 3 else (8, 8)
        Image.fromarray(generator.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    return tmp_path / "photos"


def changes(photos: Path) -> list[str]:
    dataset = f"{{type: ImageFolder, root: '{photos}', on_corrupt: skip, buckets: [[8, 8], [8, 16]]}}"
    return [
        f"data.dataset={dataset}",
        "encoder.channels=3",
        "model.in_channels=3",
        "num_classes=2",
        "sample_classes=[0]",
    ]


def test_a_dry_run_and_a_run_say_what_they_train_on(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["-c", "configs/image/digits/speedit.yaml", "-p", "train"]
    run = arguments(tmp_path / "run", max_training_steps=3, sample_every=0, data__batch_size=8)
    assert main([*common, *run, *changes(photos), "--dry-run"]) == 0
    described = capsys.readouterr().out.splitlines()
    wanted = {
        "samples": "20",
        "classes": "2 (cat, dog)",
        "buckets": "8 x 8 (17), 8 x 16 (3)",
        "never drawn": "1 bucket with fewer samples than a batch (8): 8 x 16 (3)",
        "steps per epoch": "2 of 8 samples; 4 samples left over",
    }
    assert [f"{name:<19}{text}" for name, text in wanted.items()] == described[-len(wanted) :]
    with pytest.warns(UserWarning, match=r"corrupt image .*19\.png"):
        assert main([*common, *run, *changes(photos)]) == 0
    said = capsys.readouterr().out.splitlines()
    # Before anything slow.
    assert said[0] == f"train: starting in {tmp_path}/run"
    assert all(f"{name}: {text}" in said for name, text in wanted.items())
    assert "skipped 1 damaged sample; others were used instead" in said


def test_a_dry_run_says_why_the_data_cannot_be_used(tmp_path: Path) -> None:
    config = small_config(tmp_path, data__dataset=f"{{type: ImageFolder, root: {tmp_path}/nowhere}}")
    assert describe(config).text.splitlines()[-1] == (
        f"data               cannot be used: ImageFolder needs root to be a folder, got {tmp_path}/nowhere"
    )
    config = load_config(
        "configs/image/digits/speedit.yaml",
        "train",
        [*arguments(tmp_path), "num_classes=4", "sample_classes=[0]"],
    )
    assert "the dataset has 10 classes, got num_classes: 4" in str(describe(config).fault)
