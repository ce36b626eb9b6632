import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torch import Tensor

from speedit_plugins.trainer.data.images.emoji import Emoji
from speedit_plugins.trainer.evaluation.distances import (
    FeatureStatistics,
    feature_statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from speedit_plugins.trainer.evaluation.features import Pixels


def gaussian(dim: int, seed: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """A random mean and a random covariance of the given rank."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank or dim, generator=generator, dtype=torch.float64)
    return torch.randn(dim, generator=generator, dtype=torch.float64), factor @ factor.T


class TestFrechet:
    @given(
        means=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2),
        deviations=st.lists(st.floats(0, 1e3), min_size=2, max_size=2),
    )
    def test_in_one_dimension_it_is_the_distance_of_mean_and_deviation(
        self, means: list[float], deviations: list[float]
    ) -> None:
        (m1, m2), (s1, s2) = means, deviations
        got = frechet_distance(
            torch.tensor([m1]), torch.tensor([[s1**2]]), torch.tensor([m2]), torch.tensor([[s2**2]])
        )
        # The inputs are rounded to float32: use the rounded values.
        v1, v2 = float(torch.tensor(s1**2)), float(torch.tensor(s2**2))
        expected = (float(torch.tensor(m1)) - float(torch.tensor(m2))) ** 2 + (
            math.sqrt(v1) - math.sqrt(v2)
        ) ** 2
        # v1 + v2 - 2 sqrt(v1 v2) cancels: the error is float64's eps times the terms.
        assert got == pytest.approx(expected, rel=1e-12, abs=1e-14 * (v1 + v2))

    def test_for_commuting_covariances_it_is_the_distance_of_the_deviations(self) -> None:
        basis = torch.linalg.qr(gaussian(6, 0)[1]).Q
        d1, d2 = torch.arange(6.0).double(), torch.tensor([3.0, 0.0, 2.0, 5.0, 1.0, 4.0]).double()
        zero = torch.zeros(6)
        got = frechet_distance(zero, basis * d1**2 @ basis.T, zero, basis * d2**2 @ basis.T)
        assert got == pytest.approx(float((d1 - d2).square().sum()), rel=1e-12)

    @given(dim=st.integers(1, 12), seed=st.integers(0, 10**6))
    def test_it_is_symmetric_zero_for_equal_gaussians_and_grows_with_the_mean(
        self, dim: int, seed: int
    ) -> None:
        (m1, c1), (m2, c2) = gaussian(dim, seed), gaussian(dim, seed + 1)
        scale = float(c1.trace() + c2.trace())
        distance = frechet_distance(m1, c1, m2, c2)
        assert distance >= 0.0
        assert distance == pytest.approx(frechet_distance(m2, c2, m1, c1), abs=1e-12 * scale)
        assert frechet_distance(m1, c1, m1, c1) == pytest.approx(0.0, abs=1e-12 * scale)
        shift = torch.ones(dim, dtype=torch.float64)
        assert frechet_distance(m1, c1, m1 + shift, c1) == pytest.approx(dim, abs=1e-12 * (scale + dim))

    @pytest.mark.parametrize("seed", range(5))
    def test_it_agrees_with_scipys_matrix_square_root(self, seed: int) -> None:
        (m1, c1), (m2, c2) = gaussian(10, seed), gaussian(10, seed + 100)
        root = sqrtm((c1 @ c2).numpy()).real
        expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace()) - 2 * np.trace(root)
        # scipy's square roots of these well-conditioned products are accurate to about 1e-10.
        assert frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-8)

    def test_singular_covariances_keep_full_precision(self) -> None:
        # The supports are orthogonal, so the distance is the sum of both traces.
        c1, c2 = torch.zeros(40, 40).double(), torch.zeros(40, 40).double()
        c1[:3, :3], c2[3:7, 3:7] = gaussian(3, 0)[1], gaussian(4, 1)[1]
        zero = torch.zeros(40)
        assert frechet_distance(zero, c1, zero, c2) == pytest.approx(
            float(c1.trace() + c2.trace()), rel=1e-12
        )
        mean, cov = gaussian(40, 2, rank=5)
        assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0.0, abs=1e-12 * float(cov.trace()))

    def test_it_agrees_with_torchmetrics_on_the_same_features(self) -> None:
        fid = pytest.importorskip("torchmetrics.image.fid")

        class Features(torch.nn.Module):
            num_features = 8

            def forward(self, images: Tensor) -> Tensor:
                return images.flatten(start_dim=1)

        generator = torch.Generator().manual_seed(0)
        real = torch.randn(300, 1, 2, 4, generator=generator)
        fake = torch.randn(200, 1, 2, 4, generator=generator) * 1.5 + 0.3
        theirs = fid.FrechetInceptionDistance(feature=Features(), normalize=True)
        theirs.set_dtype(torch.float64)
        theirs.update(real, real=True)
        theirs.update(fake, real=False)
        first, second = FeatureStatistics.of(real.flatten(1)), FeatureStatistics.of(fake.flatten(1))
        ours = first.frechet_distance(second)
        # torchmetrics may return float32, and sums raw squares of values of order one.
        assert ours == pytest.approx(float(theirs.compute()), rel=1e-5)

    def test_invalid_means_and_covariances_are_refused(self) -> None:
        zero, one = torch.zeros(2), torch.eye(2)
        with pytest.raises(ValueError, match=r"means must both be \(D,\), got \(2,\) and \(3,\)"):
            frechet_distance(zero, one, torch.zeros(3), one)
        with pytest.raises(ValueError, match=r"must be \(2, 2\) like its mean, got \(3, 3\)"):
            frechet_distance(zero, torch.eye(3), zero, one)
        with pytest.raises(ValueError, match="means must be finite"):
            frechet_distance(zero + math.nan, one, zero, one)
        with pytest.raises(ValueError, match="covariance must be finite"):
            frechet_distance(zero, one * math.inf, zero, one)
        with pytest.raises(ValueError, match="must be symmetric"):
            frechet_distance(zero, torch.tensor([[1.0, 0.5], [0.0, 1.0]]), zero, one)
        with pytest.raises(ValueError, match="positive semi-definite, got eigenvalue -1"):
            frechet_distance(zero, one, zero, torch.diag(torch.tensor([1.0, -1.0])))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestKernelDistance:
    def test_small_sets_by_hand(self) -> None:
        # k(0, 0) = 1, k(1, 1) = 8, k(0, 1) = 1, hence 1 + 8 - 2.
        got = kernel_distance(
            torch.zeros(3, 1), torch.ones(3, 1), num_subsets=1, subset_size=3, generator=seeded()
        )
        assert (got.mean, got.std) == (7.0, 0.0)
        # In two dimensions k(x, y) = (x y / 2 + 1)^3; pairs of an image with itself do not count.
        x = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])
        y = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        got = kernel_distance(x, y, num_subsets=1, subset_size=2, generator=seeded())
        within = (2 * 1.0) / 2 + (2 * 1.0) / 2
        across = (2.0**3 + 1.0 + 0.0 + 1.0) / 4
        assert got.mean == pytest.approx(within - 2 * across, rel=1e-14)

    @given(seed=st.integers(0, 10**6), chunk=st.integers(9, 40))
    def test_chunks_affect_only_rounding(self, seed: int, chunk: int) -> None:
        x, y = (torch.randn(40, 5, generator=seeded(seed + i)) for i in range(2))
        whole, cut = (
            kernel_distance(x, y, num_subsets=2, subset_size=30, generator=seeded(), chunk=c)
            for c in (1000, chunk)
        )
        assert cut.mean == pytest.approx(whole.mean, abs=1e-12)
        assert cut.std == pytest.approx(whole.std, abs=1e-12)

    def test_the_estimate_is_unbiased_for_any_size(self) -> None:
        # For equal distributions the expectation is 0: the mean of 200 estimates, to 4 sigma.
        for size in (10, 25):
            found = []
            for seed in range(200):
                x, y = torch.randn(2, size, 3, generator=seeded(seed))
                found.append(kernel_distance(x, y, num_subsets=1, subset_size=size, generator=seeded()).mean)
            assert abs(np.mean(found)) < 4 * np.std(found) / math.sqrt(200)

    def test_numbers_out_of_range_are_refused(self) -> None:
        x, y = torch.zeros(5, 2), torch.zeros(4, 2)
        for number, size in ((0, 2), (1, 1), (1, 5)):
            with pytest.raises(
                ValueError, match=rf"subset_size in \[2, 4\] for 5 and 4 samples, got {number} and {size}"
            ):
                kernel_distance(x, y, num_subsets=number, subset_size=size, generator=seeded())
        with pytest.raises(ValueError, match=r"must both be \(N, D\), got \(5, 2\) and \(4, 1\)"):
            kernel_distance(x, y[:, :1], num_subsets=1, subset_size=2, generator=seeded())
        with pytest.raises(ValueError, match="features must be finite, got NaN or infinity in reference"):
            kernel_distance(x, y / 0, num_subsets=1, subset_size=2, generator=seeded())


class TestInceptionScore:
    @pytest.mark.parametrize("num_classes", [2, 10])
    def test_the_score_of_certain_and_balanced_classes_is_their_number(self, num_classes: int) -> None:
        certain = torch.eye(num_classes).repeat(6, 1)
        got = inception_score(certain, num_splits=1, generator=seeded())
        assert got.mean == pytest.approx(num_classes, rel=1e-12)
        same = torch.full((12, num_classes), 1 / num_classes)
        got = inception_score(same, num_splits=3, generator=seeded())
        assert (got.mean, got.std) == (pytest.approx(1.0, abs=1e-6), pytest.approx(0.0, abs=1e-6))

    def test_two_uncertain_classes_give_the_closed_form(self) -> None:
        # Half of the images have 0.9 for one class, half for the other: log 2 - entropy of (0.9, 0.1).
        p = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64).repeat(5, 1)
        expected = math.exp(math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1))
        got = inception_score(p, num_splits=1, generator=seeded())
        assert got.mean == pytest.approx(expected, rel=1e-12)

    def test_parts_do_not_follow_the_order_of_the_images(self) -> None:
        # Sorted by class, parts in order would each hold one class and score 1.
        certain = torch.eye(4).repeat_interleave(250, dim=0)
        got = inception_score(certain, num_splits=4, generator=seeded())
        assert got.mean > 3.9

    def test_what_is_no_probability_is_refused(self) -> None:
        for rows in (torch.ones(3, 2), torch.full((3, 2), math.nan), torch.tensor([[1.5, -0.5]])):
            with pytest.raises(ValueError, match="rows of values >= 0 that sum to 1"):
                inception_score(rows, num_splits=1, generator=seeded())
        with pytest.raises(ValueError, match=r"num_splits in \[1, N\], got \(3, 2\) and 4"):
            inception_score(torch.full((3, 2), 0.5), num_splits=4, generator=seeded())


class TestAgreementWithTorchmetrics:
    """Compares 2,000 random images with 2,000 real ones: emoji, and some of them mirrored."""

    @staticmethod
    def images() -> tuple[Tensor, Tensor]:
        emoji = Emoji()
        real = torch.stack([emoji.load(i, seeded())["image"] for i in range(len(emoji))])
        real = torch.cat([real, real[: 2000 - len(real)].flip(3)])
        noise = torch.randint(0, 256, (2000, 32, 32, 3), generator=seeded(), dtype=torch.uint8)
        return noise, ((real + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

    class Features(torch.nn.Module):
        """Averages over cells of an image, with the interface that torchmetrics needs."""

        num_features = 192

        def forward(self, images: Tensor) -> Tensor:
            return Pixels(pool=8)(images.to(torch.uint8).permute(0, 2, 3, 1)).double()

    def test_fid_and_kid(self) -> None:
        fid_module = pytest.importorskip("torchmetrics.image.fid")
        kid_module = pytest.importorskip("torchmetrics.image.kid")
        noise, real = self.images()
        fid = fid_module.FrechetInceptionDistance(feature=self.Features()).set_dtype(torch.float64)
        kid = kid_module.KernelInceptionDistance(feature=self.Features(), subsets=1, subset_size=2000)
        for metric in (fid, kid):
            metric.update(real.permute(0, 3, 1, 2), real=True)
            metric.update(noise.permute(0, 3, 1, 2), real=False)
        ours, theirs = Pixels(pool=8)(noise), Pixels(pool=8)(real)
        first, second = FeatureStatistics.of(ours), FeatureStatistics.of(theirs)
        distance = first.frechet_distance(second)
        assert distance == pytest.approx(float(fid.compute()), rel=1e-4)
        kernel = kernel_distance(ours, theirs, num_subsets=1, subset_size=2000, generator=seeded())
        assert kernel.mean == pytest.approx(float(kid.compute()[0]), rel=1e-4)

    def test_inception_score(self) -> None:
        module = pytest.importorskip("torchmetrics.image.inception")
        noise, _ = self.images()

        class Logits(torch.nn.Module):
            def forward(self, images: Tensor) -> Tensor:
                return images.double().mean(dim=(2, 3)) / 8

        theirs = module.InceptionScore(feature=Logits(), splits=1)
        theirs.update(noise.permute(0, 3, 1, 2))
        probabilities = Logits()(noise.permute(0, 3, 1, 2)).softmax(dim=1)
        ours = inception_score(probabilities, num_splits=1, generator=seeded())
        # Both are computed in float64.
        assert ours.mean == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


class TestStatistics:
    @given(
        sizes=st.lists(st.integers(0, 20), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) >= 2),
        dim=st.integers(1, 5),
        offset=st.sampled_from([0.0, 1e6]),
    )
    def test_any_split_gives_numpys_mean_and_covariance(
        self, sizes: list[int], dim: int, offset: float
    ) -> None:
        generator = torch.Generator().manual_seed(sum(sizes))
        features = torch.randn(sum(sizes), dim, generator=generator, dtype=torch.float64) + offset
        streamed = FeatureStatistics(dim)
        for chunk in features.split(sizes):
            streamed.update(chunk)
        assert streamed.count == len(features)
        # Deviations of order one with an offset of 1e6 keep ten digits.
        np.testing.assert_allclose(
            streamed.mean.numpy(), features.numpy().mean(axis=0), rtol=1e-13, atol=1e-13
        )
        expected = np.cov(features.numpy(), rowvar=False).reshape(dim, dim)
        np.testing.assert_allclose(streamed.covariance.numpy(), expected, rtol=1e-8, atol=1e-8)

    def test_float32_features_are_summed_in_float64(self) -> None:
        features = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + 100.0
        assert FeatureStatistics.of(features).covariance.dtype == torch.float64
        expected = np.cov(features.double().numpy(), rowvar=False)
        np.testing.assert_allclose(
            FeatureStatistics.of(features).covariance.numpy(), expected, rtol=1e-10, atol=1e-12
        )

    def test_results_are_copies(self) -> None:
        result = FeatureStatistics.of(torch.tensor([[1.0], [3.0]]))
        result.mean.zero_()
        result.covariance.zero_()
        assert (float(result.mean), float(result.covariance)) == (2.0, 2.0)

    def test_bad_features_say_what_is_wanted(self) -> None:
        with pytest.raises(ValueError, match="dim >= 1, got 0"):
            FeatureStatistics(0)
        result = FeatureStatistics(3)
        with pytest.raises(ValueError, match=r"features must be \(B, 3\), got \(2, 4\)"):
            result.update(torch.zeros(2, 4))
        with pytest.raises(ValueError, match="features must be finite"):
            result.update(torch.full((1, 3), math.inf))
        assert result.count == 0
        with pytest.raises(ValueError, match="mean needs at least one sample"):
            _ = result.mean
        result.update(torch.zeros(1, 3))
        with pytest.raises(ValueError, match="at least two samples, got 1"):
            _ = result.covariance

    def test_feature_statistics_calls_the_extractor_in_batches(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (23, 2, 2, 1), generator=generator, dtype=torch.uint8)
        seen: list[int] = []

        def extractor(batch: Tensor) -> Tensor:
            seen.append(len(batch))
            return batch.flatten(start_dim=1).float()

        result = feature_statistics(images, extractor, batch_size=10)
        assert seen == [10, 10, 3]
        expected = images.flatten(start_dim=1).double().mean(dim=0)
        torch.testing.assert_close(result.mean, expected, rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
            feature_statistics(images, extractor, batch_size=0)
        with pytest.raises(ValueError, match="at least one image"):
            feature_statistics(images[:0], extractor)
