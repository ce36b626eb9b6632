import pickle
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.data.videos.moving_digits import (
    DIRECTIONS,
    MovingDigits,
    direction_of,
    still_digits,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loaded(dataset: MovingDigits, seed: int = 0) -> list[dict[str, Any]]:
    """Every sample, each loaded with its own seed."""
    return [dataset.load(index, generator(seed + index)) for index in range(len(dataset))]


def videos(samples: list[dict[str, Any]]) -> Tensor:
    return torch.stack([sample["video"] for sample in samples])


def ways(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["caption"].split()[-1] for sample in samples]


def test_each_frame_holds_the_moving_digit_on_a_dark_background() -> None:
    dataset = MovingDigits(class_cond=True)
    source = load_digits()
    assert (len(dataset), dataset.channels, dataset.num_classes) == (1797, 1, 10)
    assert (dataset.image_size, dataset.num_frames) == (16, 8)
    # 8 pixels in 7 steps, rounded to whole pixels: k 8 / 7 = 0, 1.14, 2.29, 3.43, 4.57, 5.71, 6.86, 8.
    forth = [0, 1, 2, 3, 5, 6, 7, 8]
    seen = set()
    for index in range(60):
        sample = dataset.load(index, generator(index))
        assert sample["video"].dtype == torch.float32
        assert sample["label"] == source.target[index]
        way = sample["caption"].removeprefix(f"a handwritten {sample['label']} moving ")
        path = forth if way in ("right", "down") else forth[::-1]
        digit = torch.as_tensor(source.images[index] / 8.0 - 1.0, dtype=torch.float32)
        fitting = []
        for across in range(9):
            expected = torch.full((1, 8, 16, 16), -1.0)
            for frame, along in enumerate(path):
                top, left = (across, along) if way in ("left", "right") else (along, across)
                expected[0, frame, top : top + 8, left : left + 8] = digit
            fitting += [across] * torch.equal(expected, sample["video"])
        assert len(fitting) == 1
        seen.add((way, fitting[0]))
    # 60 samples miss one of nine positions with probability < 9 (8 / 9)^60 < 0.01; the seeds are fixed.
    assert {way for way, _ in seen} == set(DIRECTIONS)
    assert {across for _, across in seen} == set(range(9))


def test_captions_lists_exactly_the_captions_of_the_samples() -> None:
    dataset = MovingDigits()
    assert len(set(dataset.captions)) == 40
    assert {sample["caption"] for sample in loaded(dataset)} == set(dataset.captions)


def test_a_seed_decides_the_motion_and_samples_are_copies() -> None:
    dataset = MovingDigits()
    first = dataset.load(3, generator(1))
    assert torch.equal(first["video"], dataset.load(3, generator(1))["video"])
    assert any(not torch.equal(first["video"], dataset.load(3, generator(s))["video"]) for s in (2, 3, 4))
    first["video"].fill_(5.0)
    assert float(dataset.load(3, generator(1))["video"].max()) <= 1.0


def test_labels_and_captions_are_optional() -> None:
    assert set(MovingDigits().load(0, generator())) == {"video", "caption"}
    assert set(MovingDigits(text=False).load(0, generator())) == {"video"}
    labelled = MovingDigits(text=False, class_cond=True)
    assert set(labelled.load(0, generator())) == {"video", "label"}
    assert (labelled.num_classes, MovingDigits().num_classes) == (10, 0)


def test_the_splits_are_the_first_four_fifths_and_the_rest() -> None:
    train, test = MovingDigits(split="train"), MovingDigits(split="test")
    assert (len(train), len(test)) == (1438, 359)
    assert torch.equal(torch.cat([train.digits, test.digits]), Digits().images)


@pytest.mark.parametrize(("image_size", "num_frames"), [(16, 8), (16, 2), (16, 20), (32, 8), (64, 3)])
def test_the_direction_of_every_video_is_recognised(image_size: int, num_frames: int) -> None:
    split = "all" if image_size == 16 else "test"
    samples = loaded(MovingDigits(image_size=image_size, num_frames=num_frames, split=split))
    assert samples[0]["video"].shape == (1, num_frames, image_size, image_size)
    assert direction_of(videos(samples)) == ways(samples)


def test_directions_are_recognised_despite_noise_and_a_brighter_background() -> None:
    samples = loaded(MovingDigits(split="test"))
    clips = videos(samples)
    # On this background, noise of five sigma stays below mid-grey and so has no weight.
    noisy = clips.clamp(min=-0.75) + 0.15 * torch.randn(clips.shape, generator=generator())
    assert direction_of(noisy) == ways(samples)


def test_still_digits_equal_the_source_up_to_a_shift_over_blank_columns() -> None:
    samples = loaded(MovingDigits())
    still = still_digits(videos(samples))
    source = Digits().images
    assert still.shape == source.shape
    # Cuts are at whole pixels: without the dark columns around them, both are exactly equal.
    for mine, theirs in zip(still[:, 0], source[:, 0], strict=True):
        assert torch.equal(_between_blanks(mine), _between_blanks(theirs))


def test_a_still_digit_does_not_depend_on_its_motion() -> None:
    dataset = MovingDigits(split="test")
    once, again = (still_digits(videos(loaded(dataset, seed))) for seed in (0, 1000))
    assert torch.equal(once, again)


@pytest.mark.parametrize("image_size", [32, 64])
def test_still_digits_of_larger_frames_keep_the_mean_brightness(image_size: int) -> None:
    dataset = MovingDigits(image_size=image_size, split="test")
    still = still_digits(videos(loaded(dataset)))
    assert still.shape == (359, 1, 8, 8)
    # A box average keeps the mean. The tolerance covers float32 sums of 1,024 pixels, each rounded to 6e-8.
    assert_close(still.mean(dim=(1, 2, 3)), dataset.digits.mean(dim=(1, 2, 3)), atol=1e-5, rtol=0)


def test_all_dark_videos_cause_no_division_by_zero() -> None:
    dark = torch.full((2, 1, 4, 16, 16), -1.0)
    assert set(direction_of(dark)) <= set(DIRECTIONS)
    assert torch.equal(still_digits(dark), torch.full((2, 1, 8, 8), -1.0))


def test_anything_but_grey_videos_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grey videos \(N, 1, F, H, W\).*got \(2, 3, 4, 16, 16\)"):
        direction_of(torch.zeros(2, 3, 4, 16, 16))
    with pytest.raises(ValueError, match=r"side in \(16, 32, 64\), got \(2, 1, 4, 16, 32\)"):
        still_digits(torch.zeros(2, 1, 4, 16, 32))


def test_bad_options_say_what_is_wanted() -> None:
    with pytest.raises(ValueError, match=r"image_size in \(16, 32, 64\), got 8"):
        build(DATASETS, {"type": "MovingDigits", "image_size": 8})
    with pytest.raises(ValueError, match="num_frames >= 2, got 1"):
        MovingDigits(num_frames=1)
    with pytest.raises(ValueError, match=r"split in \('all', 'train', 'test'\), got 'val'"):
        MovingDigits(split="val")
    with pytest.raises(IndexError, match="has 1797 videos, got index 1797"):
        MovingDigits().load(1797, generator())


def test_workers_and_a_pickled_copy_give_the_same_batches() -> None:
    dataset = MovingDigits(class_cond=True)
    alone = ResumableLoader(dataset, batch_size=8)
    forked = ResumableLoader(pickle.loads(pickle.dumps(dataset)), batch_size=8, num_workers=2)  # noqa: S301 - written here
    for _ in range(3):
        mine, theirs = next(alone), next(forked)
        assert mine["caption"] == theirs["caption"]
        assert torch.equal(mine["video"], theirs["video"])
        assert torch.equal(mine["label"], theirs["label"])
    forked.close()


def _between_blanks(digit: Tensor) -> Tensor:
    """The columns of a digit (8, 8) from the first to the last one that is not all dark."""
    lit = (digit > -1.0).any(dim=0).nonzero().flatten()
    return digit[:, lit[0] : lit[-1] + 1]
