import pytest
import torch
from torch import Tensor

from speedit_plugins.registry import FEATURES, build
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.evaluation.distances import feature_statistics, frechet_distance
from speedit_plugins.trainer.evaluation.features import (
    DigitClassifier,
    FeatureExtractor,
    Pixels,
    pixels_at_8,
    read,
)


def digit_images(image_size: int = 8) -> tuple[Tensor, Tensor]:
    digits = Digits(image_size=image_size)
    images = ((digits.images + 1.0) * 127.5).round().to(torch.uint8)  # (N, 1, H, W)
    return images.permute(0, 2, 3, 1), digits.labels


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def classifier() -> DigitClassifier:
    return DigitClassifier(*digit_images())


class TestPixels:
    def test_features_are_the_pixels_over_255(self) -> None:
        images = noise(5, 6, 4, 3)
        pixels = Pixels()
        assert pixels.name == "pixels"
        features = pixels(images[:2])
        assert features.dtype == torch.float32
        # Ordered by channel, then by row.
        assert torch.equal(
            features, torch.stack([images[:2, ..., c] for c in range(3)], 1).reshape(2, 72) / 255
        )

    def test_pooled_features_are_the_cell_means(self) -> None:
        images = noise(5, 16, 16, 1)
        pixels = Pixels(pool=4)
        assert pixels.name == "pixels@4"
        expected = images.double().reshape(5, 4, 4, 4, 4).mean(dim=(2, 4)).reshape(5, 16) / 255
        torch.testing.assert_close(pixels(images).double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(pixels_at_8()(images), Pixels(pool=8)(images))

    def test_a_grid_finer_than_the_image_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"pool in \[1, 8\] for 8 x 12, got 9"):
            Pixels(pool=9)(noise(2, 8, 12, 1))
        with pytest.raises(ValueError, match="pool >= 1, got 0"):
            Pixels(pool=0)

    def test_images_of_another_shape_or_dtype_are_refused(self) -> None:
        pixels = Pixels()
        pixels(noise(2, 8, 8, 1))
        with pytest.raises(ValueError, match=r"images of one shape, \(8, 8, 1\), got \(8, 8, 3\)"):
            pixels(noise(2, 8, 8, 3))
        with pytest.raises(
            ValueError, match=r"uint8 \(N, H, W, C\), not empty; got torch.float32 \(2, 8, 8, 1\)"
        ):
            pixels(noise(2, 8, 8, 1).float())
        with pytest.raises(ValueError, match=r"got torch.uint8 \(8, 8, 1\)"):
            Pixels()(noise(8, 8, 1))


class TestDigitClassifier:
    def test_it_recognises_digits_it_was_not_trained_on(self, classifier: DigitClassifier) -> None:
        # Guessing gives 0.1; a linear classifier reaches about 0.95 on this set.
        assert classifier.accuracy > 0.9
        images, labels = digit_images()
        assert float((classifier.classify(images) == labels).double().mean()) > 0.9

    def test_accuracy_is_measured_on_held_out_images(self) -> None:
        # Random labels cannot be learned: an accuracy of 0.1 on 359 held-out images, to 5 sigma.
        images, labels = digit_images()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
        shuffled = DigitClassifier(images, labels[order], epochs=3)
        assert abs(shuffled.accuracy - 0.1) < 5 * (0.1 * 0.9 / 359) ** 0.5

    def test_features_are_32_independent_float32_numbers(self, classifier: DigitClassifier) -> None:
        images, _ = digit_images()
        assert (classifier.name, classifier.dim) == ("digit_classifier", 32)
        features = classifier(images[:50])
        assert features.shape == (50, 32)
        assert features.dtype == torch.float32
        assert not features.requires_grad
        # Features of an image do not depend on its batch, up to rounding.
        torch.testing.assert_close(features[:7], classifier(images[:7]), rtol=1e-4, atol=1e-4)
        # The covariance has full rank: no feature is dead.
        assert int(torch.linalg.matrix_rank(classifier(images).double().T.cov())) == 32

    def test_probabilities_sum_to_one_and_give_the_predicted_class(self, classifier: DigitClassifier) -> None:
        images, _ = digit_images()
        found = read(classifier, images[:40], probabilities=True).probabilities
        assert found is not None
        assert found.shape == (40, 10)
        # float32 sums of ten numbers.
        torch.testing.assert_close(found.sum(dim=1), torch.ones(40), rtol=0, atol=1e-6)
        assert torch.equal(found.argmax(dim=1), classifier.classify(images[:40]))

    def test_equal_arguments_give_equal_bits_without_global_randomness(self) -> None:
        images, labels = digit_images()
        small, few = images[:200], labels[:200]
        before = torch.random.get_rng_state()
        first = DigitClassifier(small, few, epochs=2)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(5)  # another global state
        with torch.inference_mode():
            second = DigitClassifier(small, few, epochs=2)
            assert torch.equal(first(images), second(images))
        assert first.accuracy == second.accuracy
        other = DigitClassifier(small, few, epochs=2, seed=1)
        assert not torch.equal(first(images), other(images))

    def test_larger_images_are_averaged_down(self) -> None:
        images, labels = digit_images()
        # Each pixel is repeated four times, so the cell means are the pixels.
        double = images.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        few = slice(0, 100)
        one = DigitClassifier(images[few], labels[few], epochs=1)
        two = DigitClassifier(double[few], labels[few], epochs=1)
        torch.testing.assert_close(one(images[few]), two(double[few]), rtol=1e-4, atol=1e-4)

    def test_mirrored_digits_are_farther_away_than_real_ones(self, classifier: DigitClassifier) -> None:
        images, _ = digit_images()
        real, other = (
            feature_statistics(images[::2], classifier),
            feature_statistics(images[1::2], classifier),
        )
        damaged = feature_statistics(images[1::2].flip(2), classifier)  # mirrored: pixel levels stay the same
        near = frechet_distance(real.mean, real.covariance, other.mean, other.covariance)
        far = frechet_distance(real.mean, real.covariance, damaged.mean, damaged.covariance)
        assert near < far / 10

    def test_unusable_references_are_refused(self) -> None:
        images, labels = noise(20, 8, 8, 1), torch.arange(20) % 2
        with pytest.raises(ValueError, match="needs a reference with labels, got none"):
            DigitClassifier(images, None)
        with pytest.raises(ValueError, match=r"labels int64 \(20,\), got torch.int64 \(19,\)"):
            DigitClassifier(images, labels[1:])
        with pytest.raises(ValueError, match=r"labels int64 \(20,\), got torch.float32"):
            DigitClassifier(images, labels.float())
        with pytest.raises(ValueError, match="at least 10 images, got 9"):
            DigitClassifier(images[:9], labels[:9])
        with pytest.raises(ValueError, match=r"labels 0..K-1, K >= 2, got 0..0"):
            DigitClassifier(images, labels * 0)
        with pytest.raises(ValueError, match="epochs >= 1, got 0"):
            DigitClassifier(images, labels, epochs=0)


class BrightnessOnly:
    """A user's extractor that does not need the reference set."""

    name = "brightness"

    def __init__(self, *, scale: float) -> None:
        self.scale = scale

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean(dim=(1, 2, 3))[:, None] * self.scale


def test_the_registry_builds_ours_and_a_users_extractor() -> None:
    images, labels = noise(20, 8, 8, 1), torch.arange(20) % 2
    FEATURES.register_module(name="brightness", module=BrightnessOnly)
    try:
        configs = ["pixels", "pixels@8", {"type": "pixels", "pool": 2}]
        configs += [{"type": "digit_classifier", "epochs": 1}, {"type": "brightness", "scale": 2.0}]
        built: list[FeatureExtractor] = [build(FEATURES, c, images=images, labels=labels) for c in configs]
    finally:
        FEATURES.module_dict.pop("brightness")
    assert [extractor.name for extractor in built] == [
        "pixels",
        "pixels@8",
        "pixels@2",
        "digit_classifier",
        "brightness",
    ]
    assert [extractor(images).shape[1] for extractor in built] == [64, 64, 4, 32, 1]


def test_unavailable_outputs_raise_and_name_suitable_extractors() -> None:
    images = noise(20, 8, 8, 1)
    classifier = DigitClassifier(images, torch.arange(20) % 2, epochs=1)
    with pytest.raises(
        ValueError, match="sfid needs .* spatial map, got digit_classifier; wanted efficientnet"
    ):
        read(classifier, images, spatial=True)
    with pytest.raises(ValueError, match="inception_score needs .* classes, got pixels; wanted digit"):
        read(Pixels(), images, probabilities=True)
    assert read(Pixels(), images).features.shape == (20, 64)
