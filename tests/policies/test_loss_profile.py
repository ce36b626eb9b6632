"""The running mean of the loss at each noise level."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_cases import schedules, zero_terminal
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule
from speedit_plugins.policies.densities.loss_profile import LossProfile, ProfiledTable

FLOW = NoiseSchedule.rectified_flow(1000)
# One bin, so that a block is eight losses in the order they come.
SINGLE = NoiseSchedule.from_alphas_cumprod([0.5])


def block(*values: float) -> Tensor:
    """Eight losses: those given, repeated."""
    return torch.tensor(values, dtype=torch.float64).repeat(8 // len(values))


def told(profile: LossProfile, *blocks: Tensor) -> LossProfile:
    """The profile of one bin after these blocks of losses."""
    for losses in blocks:
        profile.update(torch.zeros(len(losses), dtype=torch.int64), losses)
    return profile


def mean_of(*blocks: Tensor, **options: Any) -> float:
    """What a profile of one bin reads after these blocks of losses."""
    reading = told(LossProfile(SINGLE, **options), *blocks).read()
    assert reading is not None
    return float(reading)


def spread_losses(true_loss: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Uniformly drawn indices and losses (num,), from half to three halves of `true_loss` (T,)."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(true_loss), (num,), generator=generator)
    noise = 0.5 + torch.rand(num, generator=generator, dtype=torch.float64)
    return index, true_loss[index] * noise


# Bins


@settings(max_examples=60, deadline=None)
@given(schedule=schedules(), num_bins=st.integers(1, 80))
def test_every_bin_has_a_timestep_and_bins_rise_with_the_noise(
    schedule: NoiseSchedule, num_bins: int
) -> None:
    profile = LossProfile(schedule, num_bins=num_bins)
    T = schedule.num_timesteps
    assert 1 <= profile.num_bins <= min(num_bins, T)
    assert sorted(set(profile.bin_of.tolist())) == list(range(profile.num_bins))
    assert (profile.bin_of.diff() >= 0).all()
    profile.update(torch.arange(T).repeat(8), torch.ones(8 * T, dtype=torch.float64))
    reading = profile.read()
    assert reading is not None
    assert_close(reading, torch.ones(T, dtype=torch.float64))


def test_bins_have_equal_width_in_log_snr() -> None:
    profile = LossProfile(FLOW, num_bins=10)
    # The ends are at +-15.2, so a bin is 3.04 wide.
    width = 2 * float(FLOW.log_snr[0]) / 10
    for place in range(10):
        inside = FLOW.log_snr[profile.bin_of == place]
        assert float(inside.max() - inside.min()) <= width
        assert abs(float(inside.mean()) - (float(FLOW.log_snr[0]) - (place + 0.5) * width)) < width / 2


def test_a_timestep_without_signal_shares_the_noisiest_bin() -> None:
    profile = LossProfile(zero_terminal(NoiseSchedule.linear()))
    assert int(profile.bin_of[-1]) == profile.num_bins - 1
    assert int((profile.bin_of == profile.num_bins - 1).sum()) > 1


# The mean


def test_it_reads_a_steep_loss_within_its_noise() -> None:
    # The x0 error of data with variance 1/4 falls over five orders of magnitude.
    loss = 0.25 / (1 + 0.25 * FLOW.snr)
    profile = LossProfile(FLOW)
    for number in range(300):
        profile.update(*spread_losses(loss, 256, seed=number))
    reading = profile.read()
    assert reading is not None
    # The losses have a standard deviation of 0.29. A bin that has had n of them averages 7 n / 16 by the
    # weights of polynomial decay, and no more than 2 * 512. The draws are uniform in time, so bins at the
    # ends have few. Width of a bin 0.76: 2.4 % too high where the loss falls as 1 / SNR.
    num = 300 * 256 * torch.bincount(profile.bin_of) / 1000
    noise = 0.29 / (7 * num / 16).clamp(max=1024).sqrt()
    relative = (reading / loss).log()
    inner = (FLOW.log_snr.abs() < 9) & (noise[profile.bin_of] < 0.05)
    assert int(inner.sum()) > 900
    assert (relative[inner].abs() < 4 * noise[profile.bin_of][inner] + 0.03).all()


def test_new_losses_weigh_more() -> None:
    # Shares 1, 4/5 and 4/6: ((1 * 1/5 + 4/5 * 2) * 2/6 + 4/6 * 4)
    assert mean_of(block(1.0), block(2.0), block(4.0)) == pytest.approx((0.2 + 1.6) / 3 + 8 / 3)


def test_the_window_forgets() -> None:
    # A window of 16 losses is a share of at least 1/2 for each block, for good.
    profile = told(LossProfile(SINGLE, window=16), *[block(1.0)] * 50, block(3.0))
    assert float(profile.bin_means()) == pytest.approx(2.0)
    slow = told(LossProfile(SINGLE, window=512), *[block(1.0)] * 500, block(3.0))
    assert float(slow.bin_means()) == pytest.approx(1 + 2 * 8 / 512)


def test_a_pending_block_is_not_read() -> None:
    profile = told(LossProfile(SINGLE), block(1.0)[:7])
    assert profile.read() is None
    assert math.isnan(float(profile.bin_means()))
    assert profile.num_losses == 7
    assert float(told(profile, block(9.0)[:1]).bin_means()) == pytest.approx((7 + 9) / 8)


# Outliers


def test_a_huge_loss_counts_as_ten_medians() -> None:
    spike = block(1.0)
    spike[3] = 1e30
    assert mean_of(spike) == pytest.approx((7 + 10) / 8)
    spike[[4, 5]] = 1e37
    assert mean_of(spike) == pytest.approx((5 + 30) / 8)
    assert mean_of(block(0.5, 1.5)) == pytest.approx(1.0)  # nothing is cut that is no outlier


def test_a_huge_batch_is_held_back_and_a_huge_beginning_forgotten() -> None:
    steady = [block(1.0)] * 300
    assert mean_of(*steady, block(1e30)) == pytest.approx(1 + 9 * 8 / 512)
    assert mean_of(block(1e30), block(1.0)) == pytest.approx(1.0)
    # A loss that really rises is followed: each block may raise the mean.
    assert mean_of(*steady, *[block(1000.0)] * 600) > 900


def test_zero_and_negative_losses_are_read_and_left_behind() -> None:
    assert 0 < mean_of(block(0.0)) < 1e-30
    assert 0 < mean_of(block(-1.0)) < 1e-30
    assert mean_of(block(0.0), block(2.0)) == pytest.approx(2.0)


# Reading


def test_unseen_bins_take_their_neighbours_values() -> None:
    profile = LossProfile(FLOW, num_bins=20)
    # Only the bins 3 and 13 see losses, 8 each, and 1 and e^10: the logarithm rises by 1 for each bin.
    for place, loss in ((3, 1.0), (13, math.exp(10))):
        index = (profile.bin_of == place).nonzero()[0].repeat(8)
        profile.update(index, torch.full((8,), loss, dtype=torch.float64))
        assert profile.read() is None
    profile.update(index.repeat(18), torch.full((144,), math.exp(10), dtype=torch.float64))
    reading = profile.read()
    assert reading is not None
    assert_close(reading[profile.bin_of <= 3][0], torch.tensor(1.0, dtype=torch.float64))
    assert_close(reading[-1], torch.tensor(math.exp(10), dtype=torch.float64))
    between = (profile.bin_of > 4) & (profile.bin_of < 13)
    slope = reading.log().diff() / -FLOW.log_snr.diff()
    # Bins of 1.52, up to the distance from a bin's middle to the mean of its timesteps.
    assert_close(slope[between[1:]], slope[between[1:]].mean().expand(int(between.sum())))
    assert float(slope[between[1:]].mean()) == pytest.approx(1 / 1.52, rel=0.05)


# State


@settings(max_examples=30, deadline=None)
@given(num_before=st.integers(0, 700), seed=st.integers(0, 10**6))
def test_a_state_goes_on_as_if_it_had_not_stopped(num_before: int, seed: int) -> None:
    losses = spread_losses(1 + FLOW.sigma, 1000, seed)
    whole, first = LossProfile(FLOW), LossProfile(FLOW)
    whole.update(*losses)
    first.update(losses[0][:num_before], losses[1][:num_before])
    second = LossProfile(FLOW)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    second.update(losses[0][num_before:], losses[1][num_before:])
    assert_close(second.bin_means(), whole.bin_means(), rtol=0, atol=0, equal_nan=True)
    assert_close(second.state_dict(), whole.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_a_table_is_refreshed_every_few_updates() -> None:
    table = torch.zeros(1, dtype=torch.float64)
    follower = ProfiledTable(LossProfile(SINGLE), table, torch.sqrt, refresh_updates=3)
    index = torch.zeros(8, dtype=torch.int64)
    changed = [follower.update(index, block(float(loss))) for loss in (4, 4, 4, 9, 9, 9)]
    assert changed == [False, False, True, False, False, True]
    assert 2 < float(follower.table) < 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LossProfile(FLOW, num_bins=0), "num_bins >= 1, .* got 0, 512 and 10"),
        (lambda: LossProfile(FLOW, window=7), "window >= 8"),
        (lambda: LossProfile(FLOW, outlier=1.0), "outlier > 1"),
        (
            lambda: LossProfile(FLOW).load_state_dict(LossProfile(SINGLE).state_dict()),
            r"a loss profile needs \d\d bins, got 1",
        ),
        (
            lambda: ProfiledTable(LossProfile(FLOW), torch.ones(1000), torch.sqrt, refresh_updates=0),
            "refresh_updates >= 1, got 0",
        ),
    ],
)
def test_a_bad_profile_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
