import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.data.images.digits import Digits


def test_images_and_labels_equal_the_source_scaled_to_minus_one_to_one() -> None:
    source = load_digits()
    digits = Digits()
    assert len(digits) == 1797
    assert (digits.num_classes, digits.image_size, digits.channels) == (10, 8, 1)
    generator = torch.Generator()
    for index in (0, 1, 900, 1796):
        sample = digits.load(index, generator)
        assert sample["image"].dtype == torch.float32
        assert type(sample["label"]) is int
        assert sample["label"] == source.target[index]
        # Grey levels are multiples of 1/8 after scaling: exact in float32.
        np.testing.assert_array_equal(sample["image"][0].numpy(), source.images[index] / 8.0 - 1.0)
    assert float(digits.images.min()) == -1.0
    assert float(digits.images.max()) == 1.0


@pytest.mark.parametrize("image_size", [16, 32])
def test_enlarged_images_interpolate_between_pixel_centres(image_size: int) -> None:
    small, large = Digits(), Digits(image_size=image_size)
    assert large.image_size == image_size
    assert large.load(5, torch.Generator())["image"].shape == (1, image_size, image_size)
    # Bilinear by hand: the centre of new pixel i is at (i + 1/2) 8 / size - 1/2 on the old grid.
    at = np.clip((np.arange(image_size) + 0.5) * 8 / image_size - 0.5, 0, 7)
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, 7), at - low
    old = small.images[5, 0].double().numpy()
    rows = old[low] * (1 - share)[:, None] + old[high] * share[:, None]
    expected = rows[:, low] * (1 - share) + rows[:, high] * share
    # Weights are multiples of 1/64; only the float32 rounding of the scale remains.
    np.testing.assert_allclose(large.images[5, 0].numpy(), expected, atol=1e-6)


def test_loading_uses_no_random_numbers_and_returns_copies() -> None:
    digits = Digits()
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    sample = digits.load(7, generator)
    assert torch.equal(generator.get_state(), before)
    sample["image"].zero_()
    assert not torch.equal(digits.load(7, generator)["image"], sample["image"])


@pytest.mark.parametrize("index", [-1, 1797])
def test_an_index_outside_the_set_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"1797 images, got index {index}"):
        Digits().load(index, torch.Generator())


def test_another_size_is_refused_and_the_registry_builds_it() -> None:
    with pytest.raises(ValueError, match=r"image_size in \(8, 16, 32\), got 28"):
        build(DATASETS, {"type": "Digits", "image_size": 28})
    assert build(DATASETS, {"type": "Digits", "image_size": 16}).image_size == 16
