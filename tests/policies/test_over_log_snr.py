"""Draws of log-SNR around the middle of the data's spectrum."""

import math

import pytest
import torch
from policy_cases import unit_variance
from scipy.stats import norm

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.policies.densities.over_log_snr import log_snr_normal

LINEAR = NoiseSchedule.linear()


def test_a_centre_beyond_the_schedule_is_warned_of() -> None:
    # The log-SNR of the linear schedule goes from 9.21 to -10.12.
    with pytest.warns(UserWarning, match=r"centred at log-SNR -12.00, outside .* -10.12 to 9.21"):
        log_snr_normal(LINEAR, mean=-12.5, offset=0.5)
    with pytest.warns(UserWarning, match="centred at log-SNR 10.00, outside"):
        log_snr_normal(LINEAR, mean=10.0)


@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.cosine(), NoiseSchedule.rectified_flow()])
def test_log_snr_is_normal_on_every_schedule(schedule: NoiseSchedule) -> None:
    density = log_snr_normal(schedule, mean=0.3, offset=0.2, std=0.8)
    for edge in (-1.0, 0.5, 1.5):
        below = float(density.table[schedule.log_snr < edge].sum())
        # The timestep at the edge has at most 1 % of the mass, and at most half of it is on the wrong side.
        assert below == pytest.approx(norm.cdf(edge, 0.5, 0.8), abs=0.01)


def test_both_tails_keep_their_mass() -> None:
    table = log_snr_normal(LINEAR, mean=0.0, std=1.0).table
    edges = (LINEAR.log_snr[1:] + LINEAR.log_snr[:-1]) / 2
    assert float(table[1]) == pytest.approx(norm.sf(float(edges[1])) - norm.sf(float(edges[0])), rel=1e-6)
    assert float(table[-2]) == pytest.approx(
        norm.cdf(float(edges[-2])) - norm.cdf(float(edges[-1])), rel=1e-6
    )


def test_noise_alone_is_drawn_as_often_as_by_uniform_draws() -> None:
    signal, schedule = (NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.1, *end]) for end in ([], [0.0]))
    for share in (0.0, 0.2):
        law, table = (log_snr_normal(s, mean=0.0, clean_share=share).table for s in (signal, schedule))
        torch.testing.assert_close(table[:-1], 0.75 * law)
        assert float(table[-1]) == pytest.approx(0.25)
    flow = NoiseSchedule(1 - (t := torch.arange(1, 1001).double() / 1000), t, torch.arange(1000), 1000)
    for name in ("spectral", "spectral_fast", "spectral_flow"):
        policy = build_policy({"type": name, "mean": 0.0}, flow)
        assert float(policy.density[-1]) == pytest.approx(0.001)


def test_p2_weights_have_mean_one_half_about_equal_signal_and_noise() -> None:
    # As a function of log-SNR, 1 / (1 + SNR) is odd around 1/2, and the draws are symmetric around 0.
    parts = {"density": {"type": "log_snr_normal", "mean": 0.0, "std": 1.3}, "weighting": "p2"}
    assert build_policy(parts, LINEAR).mean_weight == pytest.approx(0.5, abs=1e-4)


def test_a_width_of_the_clean_side_splits_the_normal_law() -> None:
    table = log_snr_normal(LINEAR, mean=0.3, std=2.0, clean_std=0.5).table
    noisier, cleaner = LINEAR.log_snr < 0.3, LINEAR.log_snr > 0.3
    # Each side's mass is proportional to its width, up to half of the bin at the mode (0.2 % of all draws).
    assert float(table[noisier].sum() / table[cleaner].sum()) == pytest.approx(4, rel=0.02)
    # The density per unit of log-SNR is continuous at the mode, and normal on each side. Two standard
    # deviations away, reading it half a bin off changes it by 2 %.
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
    wanted = r"clean_share needs timesteps cleaner than log-SNR 30.00, got none"
    with pytest.raises(ValueError, match=wanted), pytest.warns(UserWarning, match="outside the schedule"):
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


def test_spectral_flow_is_logit_normal_in_strata() -> None:
    schedule = NoiseSchedule.rectified_flow()
    policy = build_policy({"type": "spectral_flow", "mean": 0.5}, schedule)
    # A normal law of log-SNR is one of logit(u) = -log-SNR / 2, and the bins of both are nearly the same.
    usual = build_policy({"type": "logit_normal", "mean": -(0.5 * 0.5 + 1.0) / 2, "std": 1.0}, schedule)
    torch.testing.assert_close(policy.density.cumsum(0), usual.density.cumsum(0), atol=2e-3, rtol=0)
    assert torch.equal(policy.weight, usual.weight)
    assert policy.stratified


def test_data_are_asked_only_where_the_centre_is_not_given() -> None:
    measured = build_policy("spectral", LINEAR, data_spectrum=unit_variance)
    given = build_policy({"type": "spectral", "mean": 0.0}, LINEAR, data_spectrum=None)
    torch.testing.assert_close(measured.density, given.density, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="needs mean, .* Measure it: speedit_plugins.DataSpectrum.of"):
        build_policy("spectral_fast", LINEAR)


def test_parameters_out_of_range_are_refused() -> None:
    for options in (
        {"std": 0.0},
        {"clean_std": 0.0},
        {"mean": math.inf},
        {"slope": math.inf},
        {"offset": math.nan},
    ):
        with pytest.raises(ValueError, match="finite mean, slope and offset, and std and clean_std > 0, got"):
            log_snr_normal(LINEAR, **{"mean": 0.0, **options})
    # Wrong parameters are refused before the data are read.
    with pytest.raises(ValueError, match="std and clean_std > 0, got None, 1.0, 0.0, 1.2 and -1.0"):
        log_snr_normal(LINEAR, lambda: pytest.fail("the data were asked"), clean_std=-1.0)
    with pytest.raises(ValueError, match=r"slope \* mean \+ offset near .* -10.12 to 9.21, got -99.00"):
        log_snr_normal(LINEAR, mean=-100.0, offset=1.0)
