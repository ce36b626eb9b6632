"""Weights divided by the running mean of the weighted loss."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.weightings.by_noise_level import min_snr
from speedit_plugins.policies.weightings.loss_normalized import LossNormalizedPolicy

# The SNR is 4, 1 and 1/4, so Min-SNR with gamma = 1 gives the weights 1/4, 1 and 1.
SCHEDULE = NoiseSchedule.from_alphas_cumprod([0.8, 0.5, 0.2])
WEIGHTS = torch.tensor([0.25, 1.0, 1.0], dtype=torch.float64)
CONFIG = {"density": "uniform", "weighting": {"type": "min_snr", "gamma": 1.0}, "normalize": "loss"}


def taught(policy: LossNormalizedPolicy, *losses: float) -> LossNormalizedPolicy:
    """The policy after one update for each loss. In an update, every timestep has the same loss."""
    for loss in losses:
        policy.update(torch.arange(3), torch.full((3,), loss))
    return policy


def test_the_weighted_loss_is_one_while_the_loss_stays_the_same() -> None:
    policy = build_policy(CONFIG, SCHEDULE)
    relative = WEIGHTS / 0.75
    assert_close(policy.weight, relative)
    # Two timesteps with unequal losses have the weighted mean (1/3 * 6 + 4/3 * 3) / 2 = 3.
    policy.update(torch.tensor([0, 1]), torch.tensor([6.0, 3.0]))
    assert_close(policy.weight, relative / 3)
    draw = policy.draw(200, generator=torch.Generator().manual_seed(0))
    assert_close(draw.weight, (relative / 3).float()[draw.index])
    # The next mean is 5, and enters the running mean with 5 %.
    taught(policy, 5.0)
    assert_close(policy.weight, relative / (0.95 * 3 + 0.05 * 5))


def test_tables_on_a_device_follow() -> None:
    policy = build_policy(CONFIG, SCHEDULE)
    generator = torch.Generator()
    before = policy.draw(50, generator=generator.manual_seed(0))
    after = taught(policy, 2.0).draw(50, generator=generator.manual_seed(0))
    assert torch.equal(after.index, before.index)
    assert_close(after.weight, before.weight / 2)


def test_losses_that_say_nothing_are_not_seen() -> None:
    policy = taught(build_policy(CONFIG, SCHEDULE), 2.0)
    before = policy.weight
    nothing = (torch.full((3,), torch.nan), torch.full((3,), torch.inf), torch.zeros(3))
    for loss in nothing:
        policy.update(torch.arange(3), loss)
        assert torch.equal(policy.weight, before)
    policy.update(torch.arange(3), torch.tensor([torch.nan, 2.0, 2.0]))
    # The running mean was 2. This update has the mean 4/3 * 2 = 8/3.
    assert_close(policy.weight, before * 2 / (0.95 * 2 + 0.05 * 8 / 3))


def test_a_density_that_learns_keeps_learning() -> None:
    config = {"type": "loss_second_moment", "history": 1, "normalize": "loss"}
    policy = build_policy(config, SCHEDULE)
    losses = torch.tensor([1.0, 2.0, 3.0])
    policy.update(torch.arange(3), losses)
    # One draw in a thousand is uniform.
    assert_close(policy.density, 0.999 * losses.double() / 6 + 0.001 / 3)
    # 1 / (T p) has mean 1. The running mean is 2, the mean of the first losses with uniform weights.
    assert_close(policy.weight, 1 / (3 * policy.density) / 2)


def test_a_restored_policy_goes_on_as_the_saved_one(tmp_path: Path) -> None:
    policy = taught(build_policy(CONFIG, SCHEDULE), 3.0, 1.0)
    torch.save(policy.state_dict(), tmp_path / "state.pt")
    fresh = build_policy(CONFIG, SCHEDULE)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.weight, policy.weight)
    assert torch.equal(taught(fresh, 0.5).weight, taught(policy, 0.5).weight)
    # A fresh state restores the first weights.
    fresh.load_state_dict(build_policy(CONFIG, SCHEDULE).state_dict())
    assert torch.equal(fresh.weight, build_policy(CONFIG, SCHEDULE).weight)


def test_a_state_belongs_to_one_normalize() -> None:
    normalised, plain = (build_policy({**CONFIG, "normalize": kind}, SCHEDULE) for kind in ("loss", True))
    with pytest.raises(ValueError, match=r"keys of only one of them: \['mean_loss'\]$"):
        normalised.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match=r"keys of only one of them: \['mean_loss'\]$"):
        plain.load_state_dict(normalised.state_dict())


def test_a_loss_of_the_whole_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update needs .* got torch.int64 \(3,\) and torch.float32 \(\)"):
        build_policy(CONFIG, SCHEDULE).update(torch.arange(3), torch.tensor(1.0))


def test_a_copy_learns_by_itself() -> None:
    policy = build_policy(CONFIG, SCHEDULE)
    other = taught(copy.deepcopy(policy), 4.0)
    assert_close(other.weight, policy.weight / 4)


def test_parameters_out_of_range_are_refused() -> None:
    density = build_policy("uniform", SCHEDULE)._base
    with pytest.raises(ValueError, match=r"loss_decay needs to be in \[0, 1\), got 1.0"):
        LossNormalizedPolicy(SCHEDULE, density, lambda _: min_snr(SCHEDULE), loss_decay=1.0)
    with pytest.raises(ValueError, match="policy normalize needs true, false or 'loss', got 'losses'"):
        build_policy({**CONFIG, "normalize": "losses"}, SCHEDULE)
