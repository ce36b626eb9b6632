"""The spectrum of data, and the log-SNR at its middle."""

import math

import pytest
import torch
from policy_cases import unit_variance

from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.trainer.data.images.digits import Digits


def some_images(num_samples: int) -> torch.Tensor:
    images = Digits(image_size=8).images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_samples]]


@pytest.mark.parametrize("variance", [1.0, 0.25, 9.0])
def test_half_of_one_component_is_explained_where_noise_has_its_variance(variance: float) -> None:
    spectrum = DataSpectrum(torch.tensor([variance]))
    assert spectrum.log_snr_at() == pytest.approx(-math.log(variance), abs=1e-8)
    assert spectrum.explained(-math.log(variance)) == pytest.approx(0.5)


def test_explained_is_the_wiener_filters_share() -> None:
    variances = torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 3, generator=generator, dtype=torch.float64) * variances.sqrt()
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    snr = 0.7
    noisy = math.sqrt(snr) * x + noise
    left = x - noisy * (math.sqrt(snr) * variances / (1 + snr * variances))
    share = 1 - float((left**2).sum() / (x**2).sum())
    # Each of the two sums has a standard error below 0.3 %.
    assert DataSpectrum(variances).explained(math.log(snr)) == pytest.approx(share, abs=0.01)


def test_both_gram_matrices_give_the_components() -> None:
    generator = torch.Generator().manual_seed(1)
    tall = torch.randn(40, 3, 2, generator=generator)
    wide = torch.randn(5, 3, 2, generator=generator)
    for x in (tall, wide):
        expected = torch.linalg.svdvals((x.flatten(1) - x.flatten(1).mean(0)).double()) ** 2 / (len(x) - 1)
        found = DataSpectrum.of(x).variances.sort(descending=True).values
        assert len(found) == len(x) - 1
        torch.testing.assert_close(found[: len(expected)], expected[: len(found)], atol=1e-6, rtol=0)
        assert not found[len(expected) :].any()


def test_scaled_data_move_the_middle_by_the_log_of_their_power() -> None:
    images = some_images(300)
    middle = DataSpectrum.of(images).log_snr_at()
    assert DataSpectrum.of(3 * images).log_snr_at() == pytest.approx(middle - 2 * math.log(3), abs=1e-6)
    # Each pixel appears four times: the same components, with four times the variance.
    enlarged = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert DataSpectrum.of(enlarged).log_snr_at() == pytest.approx(middle - math.log(4), abs=1e-6)


def test_some_hundred_samples_find_the_middle() -> None:
    images = some_images(1600)
    whole = DataSpectrum.of(Digits(image_size=8).images).log_snr_at()
    parts = torch.tensor([DataSpectrum.of(part).log_snr_at() for part in images.split(200)])
    # Eight sets of 200 samples: their mean is within four standard errors of the middle of all samples. A
    # single set has a standard deviation below 0.1.
    assert float(parts.mean()) == pytest.approx(whole, abs=4 * float(parts.std()) / math.sqrt(8))
    assert float(parts.std()) < 0.1


@pytest.mark.parametrize("power", [0, 1, 2])
def test_fewer_samples_than_values_find_the_middle_too(power: int) -> None:
    # The variances of 32 x 32 pixels fall as a power of frequency. Power 0 is white noise.
    frequency = torch.fft.fftfreq(32, dtype=torch.float64).mul(32)
    variances = (1 + torch.hypot(frequency[:, None], frequency).flatten()) ** -power
    data = DataSpectrum(variances / variances.mean())
    generator = torch.Generator().manual_seed(2)
    for num_samples in (300, 1000, 3000):
        noise = torch.randn(num_samples, 1024, generator=generator, dtype=torch.float64)
        found = DataSpectrum.of(noise * data.variances.sqrt())
        # Without the correction, the middle of 300 samples is 0.9 to 1.4 too low.
        assert found.log_snr_at() == pytest.approx(data.log_snr_at(), abs=0.05)
        assert found.explained(-1.0) == pytest.approx(data.explained(-1.0), abs=0.01)


# White noise with 1,024 values. 10 and 100 samples never explain half of it. For 130, the smallest variance
# alone decides.
@pytest.mark.parametrize("num_samples", [10, 100, 130])
def test_samples_too_few_to_tell_are_refused(num_samples: int) -> None:
    samples = torch.randn(num_samples, 1024, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=f"{num_samples} samples are too few to tell where 50% of the data"):
        DataSpectrum.of(samples).log_snr_at()


def test_samples_that_are_all_equally_unlike_tell_nothing() -> None:
    with pytest.raises(ValueError, match="10 samples are too few to tell"):
        DataSpectrum.of(torch.eye(10, 1024)).log_snr_at()


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 4), r"at least two samples \(N, ...\), got shape \(1, 4\)"),
        (torch.zeros(9), r"at least two samples \(N, ...\), got shape \(9,\)"),
        (torch.zeros(9, 4, dtype=torch.uint8), "floating-point samples, .* got torch.uint8"),
        (torch.ones(3, 4), "samples that differ, got 3 equal samples"),
        ([[1.0], [2.0]], r"a tensor \(N, ...\), got list"),
        (torch.tensor([[0.0], [math.nan]]), "finite samples, got inf or NaN"),
    ],
)
def test_samples_without_a_spectrum_are_refused(samples: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSpectrum.of(samples)


@pytest.mark.parametrize("variance", [1e20, 1e-20])
def test_a_middle_out_of_reach_is_refused(variance: float) -> None:
    # Half is explained at log-SNR -ln(variance), so at -46 and 46.
    with pytest.raises(ValueError, match=r"no log-SNR in \[-40, 40\] .* got variances that sum to 1e"):
        DataSpectrum(torch.tensor([variance])).log_snr_at()


def test_shares_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\), got 1"):
        unit_variance().log_snr_at(1.0)
