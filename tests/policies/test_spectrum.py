"""The spectrum of data, and draws of log-SNR about its middle."""

import math

import pytest
import torch
from policy_cases import unit_variance
from scipy.stats import norm

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.spectrum import DataSpectrum, log_snr_normal
from speedit_plugins.trainer.data.images.digits import Digits

LINEAR = NoiseSchedule.linear()


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
    # The standard error of each of the two sums is below 0.3 % of it.
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
    # Each pixel four times: the same components, with four times the variance.
    enlarged = images.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert DataSpectrum.of(enlarged).log_snr_at() == pytest.approx(middle - math.log(4), abs=1e-6)


def test_some_hundred_samples_find_the_middle() -> None:
    images = some_images(1600)
    whole = DataSpectrum.of(Digits(image_size=8).images).log_snr_at()
    parts = torch.tensor([DataSpectrum.of(part).log_snr_at() for part in images.split(200)])
    # Eight sets of 200: their mean is as far from the whole's as four of its standard errors at most, and
    # one of them off by a tenth.
    assert float(parts.mean()) == pytest.approx(whole, abs=4 * float(parts.std()) / math.sqrt(8))
    assert float(parts.std()) < 0.1


@pytest.mark.parametrize("power", [0, 1, 2])
def test_fewer_samples_than_values_find_the_middle_too(power: int) -> None:
    # Variances of a field of 32 x 32 pixels that fall as a power of frequency; 0 is white noise.
    frequency = torch.fft.fftfreq(32, dtype=torch.float64).mul(32)
    variances = (1 + torch.hypot(frequency[:, None], frequency).flatten()) ** -power
    data = DataSpectrum(variances / variances.mean())
    generator = torch.Generator().manual_seed(2)
    for num_samples in (300, 1000, 3000):
        noise = torch.randn(num_samples, 1024, generator=generator, dtype=torch.float64)
        found = DataSpectrum.of(noise * data.variances.sqrt())
        # Uncorrected, the middle of 300 samples lies 0.9 to 1.4 too low.
        assert found.log_snr_at() == pytest.approx(data.log_snr_at(), abs=0.05)
        assert found.explained(-1.0) == pytest.approx(data.explained(-1.0), abs=0.01)


# Of 1,024 values of white noise 10 and 100 do not reach it; 130 reach it by the smallest of their variances.
@pytest.mark.parametrize("num_samples", [10, 100, 130])
def test_samples_too_few_to_tell_are_refused(num_samples: int) -> None:
    samples = torch.randn(num_samples, 1024, generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=f"{num_samples} samples are too few to tell where 50% of the data"):
        DataSpectrum.of(samples).log_snr_at()


def test_samples_that_are_all_equally_unlike_tell_nothing() -> None:
    with pytest.raises(ValueError, match="10 samples are too few to tell"):
        DataSpectrum.of(torch.eye(10, 1024)).log_snr_at()


def test_a_centre_beyond_the_schedule_is_warned_of() -> None:
    # Its log-SNR goes from 9.21 to -10.12.
    with pytest.warns(UserWarning, match=r"centred at log-SNR -12.00, beyond .* from 9.21 to -10.12"):
        log_snr_normal(LINEAR, mean=-12.5, shift=0.5)
    with pytest.warns(UserWarning, match="centred at log-SNR 10.00, beyond"):
        log_snr_normal(LINEAR, mean=10.0)


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(), NoiseSchedule.rectified_flow()])
def test_log_snr_is_normal_on_every_schedule(schedule: NoiseSchedule) -> None:
    density = log_snr_normal(schedule, mean=0.3, shift=0.2, std=0.8)
    for edge in (-1.0, 0.5, 1.5):
        below = float(density.table[schedule.log_snr < edge].sum())
        # Up to half the mass of the timestep at the edge, which is at most 1 %.
        assert below == pytest.approx(norm.cdf(edge, 0.5, 0.8), abs=0.01)


def test_both_tails_keep_their_mass() -> None:
    table = log_snr_normal(LINEAR, mean=0.0, std=1.0).table
    edges = (LINEAR.log_snr[1:] + LINEAR.log_snr[:-1]) / 2
    assert float(table[1]) == pytest.approx(norm.sf(float(edges[1])) - norm.sf(float(edges[0])), rel=1e-6)
    assert float(table[-2]) == pytest.approx(
        norm.cdf(float(edges[-2])) - norm.cdf(float(edges[-1])), rel=1e-6
    )


def test_a_zero_terminal_end_has_no_mass() -> None:
    schedule = NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1, 0.0])
    table = log_snr_normal(schedule, mean=0.0).table
    assert float(table[-1]) == 0.0
    assert (table[:-1] > 0).all()


def test_p2_weights_have_mean_one_half_about_equal_signal_and_noise() -> None:
    # 1 / (1 + SNR) is odd about 1/2 in log-SNR, and so are draws about 0.
    parts = {"density": {"type": "log_snr_normal", "mean": 0.0, "std": 1.3}, "weighting": "p2"}
    assert build_policy(parts, LINEAR).mean_weight == pytest.approx(0.5, abs=1e-4)


def test_a_width_of_the_clean_side_splits_the_normal_law() -> None:
    table = log_snr_normal(LINEAR, mean=0.3, std=2.0, clean_std=0.5).table
    noisier, cleaner = LINEAR.log_snr < 0.3, LINEAR.log_snr > 0.3
    # Each side's mass is as its width, but for half of the bin at the mode, 0.2 % of all draws.
    assert float(table[noisier].sum() / table[cleaner].sum()) == pytest.approx(4, rel=0.02)
    # Across the mode the law is continuous per unit of log-SNR; each side is a normal one, read half a bin
    # off, which is 2 % at two widths.
    per_unit = table / -torch.gradient(LINEAR.log_snr)[0]
    at = {value: float(per_unit[(LINEAR.log_snr - value).abs().argmin()]) for value in (-3.7, 0.3, 1.3)}
    assert at[-3.7] / at[0.3] == pytest.approx(math.exp(-2), rel=0.05)
    assert at[1.3] / at[0.3] == pytest.approx(math.exp(-2), rel=0.05)
    same = log_snr_normal(LINEAR, mean=0.3, std=0.7, clean_std=0.7).table
    torch.testing.assert_close(same, log_snr_normal(LINEAR, mean=0.3, std=0.7).table, atol=0, rtol=0)


def test_the_clean_share_lies_evenly_on_what_is_cleaner_than_the_centre() -> None:
    plain, mixed = (
        log_snr_normal(LINEAR, mean=0.3, std=0.7, clean_share=share).table for share in (0.0, 0.2)
    )
    cleaner = LINEAR.log_snr > 0.3
    rest = mixed - 0.8 * plain
    torch.testing.assert_close(rest[cleaner], torch.full_like(rest[cleaner], 0.2 / int(cleaner.sum())))
    torch.testing.assert_close(rest[~cleaner], torch.zeros_like(rest[~cleaner]), atol=1e-12, rtol=0)


def test_a_clean_share_without_cleaner_timesteps_is_refused() -> None:
    wanted = r"timesteps cleaner than log-SNR 30.00 for clean_share, got none"
    with pytest.raises(ValueError, match=wanted), pytest.warns(UserWarning, match="beyond the schedule"):
        log_snr_normal(LINEAR, mean=30.0, std=20.0, clean_share=0.1)
    with pytest.raises(ValueError, match=r"clean_share in \[0, 1\), got 1.0"):
        log_snr_normal(LINEAR, mean=0.0, clean_share=1.0)


@pytest.mark.parametrize("name", ["spectral", "spectral_fast"])
def test_the_spectral_policies_are_stratified_and_normalised_unless_told_otherwise(name: str) -> None:
    policy = {"type": name, "mean": 0.0}
    usual, other = (
        build_policy({**policy, **options}, LINEAR)
        for options in ({}, {"stratified": False, "normalize": False})
    )
    assert usual.stratified
    assert usual.mean_weight == pytest.approx(1)
    assert not other.stratified
    torch.testing.assert_close(other.weight, (5 + LINEAR.snr) ** -0.8)
    assert torch.equal(other.density, usual.density)


def test_spectral_flow_weighs_nothing() -> None:
    schedule = NoiseSchedule.rectified_flow()
    policy = build_policy({"type": "spectral_flow", "mean": 0.5}, schedule)
    law = log_snr_normal(schedule, mean=0.5, shift=0.6, std=1.6, clean_std=2.2, clean_share=0.15)
    assert torch.equal(policy.density, law.table)
    torch.testing.assert_close(policy.weight, torch.ones_like(policy.weight))
    assert policy.stratified


def test_data_are_asked_only_where_the_centre_is_not_given() -> None:
    measured = build_policy("spectral", LINEAR, data_spectrum=unit_variance)
    given = build_policy({"type": "spectral", "mean": 0.0}, LINEAR, data_spectrum=None)
    torch.testing.assert_close(measured.density, given.density, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="log_snr_normal needs mean, .* DataSpectrum.of"):
        build_policy("spectral_fast", LINEAR)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (torch.zeros(1, 4), r"at least two samples \(N, ...\), got shape \(1, 4\)"),
        (torch.zeros(9), r"at least two samples \(N, ...\), got shape \(9,\)"),
        (torch.zeros(9, 4, dtype=torch.uint8), "of floating point, got torch.uint8"),
        (torch.ones(3, 4), "samples that differ, got 3 alike"),
        ([[1.0], [2.0]], r"a tensor \(N, ...\), got list"),
        (torch.tensor([[0.0], [math.nan]]), "finite samples, got inf or NaN"),
    ],
)
def test_samples_without_a_spectrum_are_refused(samples: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataSpectrum.of(samples)


@pytest.mark.parametrize("variance", [1e20, 1e-20])
def test_a_middle_out_of_reach_is_refused(variance: float) -> None:
    # At log-SNR -ln(variance) = -46 and 46.
    with pytest.raises(ValueError, match=r"at no log-SNR in \[-40, 40\].* got variances that sum to 1e"):
        DataSpectrum(torch.tensor([variance])).log_snr_at()


def test_shares_and_parameters_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(0, 1\), got 1"):
        unit_variance().log_snr_at(1.0)
    for options in ({"std": 0.0}, {"clean_std": 0.0}, {"mean": math.inf}, {"shift": math.nan}):
        with pytest.raises(ValueError, match="finite mean and shift, and std and clean_std > 0, got"):
            log_snr_normal(LINEAR, **{"mean": 0.0, **options})
    # Before the data are read.
    with pytest.raises(ValueError, match="std and clean_std > 0, got None, 0.0, 1.2 and -1.0"):
        log_snr_normal(LINEAR, lambda: pytest.fail("the data were asked"), clean_std=-1.0)
    with pytest.raises(ValueError, match=r"no mass on the schedule, .* from -10.12 to 9.21: .* is -99.00"):
        log_snr_normal(LINEAR, mean=-100.0, shift=1.0)
