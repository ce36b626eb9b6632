"""Seam C: a schedule sampler that replaces the host's."""

from typing import Any

import numpy as np
import pytest
import torch
from host_standins import (
    IMAGES,
    LossAwareSampler,
    LossType,
    MaskedDiffusion,
    ScheduleSampler,
    SpacedDiffusion,
    create,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.entry import with_policy, without_policy
from speedit_plugins.hosts.schedule_sampler import built_in_weights, schedule_sampler
from speedit_plugins.policies.policy import TimestepPolicy


def model(x: Tensor, t: Tensor, **_: Any) -> Tensor:
    return torch.cat([torch.sin(x), 0.3 * x], dim=1)


class TestSample:
    def test_mse_weights_are_left_to_the_object(self) -> None:
        t, weights = schedule_sampler(create(), "speedit").sample(64, "cpu")
        assert t.dtype == torch.int64
        assert t.shape == (64,)
        assert torch.equal(weights, torch.ones(64))

    def test_weights_of_the_whole_loss_are_the_hosts_own(self) -> None:
        diffusion = create()
        sampler = schedule_sampler(
            diffusion, dict(density="uniform", weighting="inverse_density", scope="loss")
        )
        # 1 / (T p) is 1 for a uniform density.
        assert torch.allclose(sampler.sample(8, "cpu")[1], torch.ones(8))
        assert type(diffusion) is SpacedDiffusion

    def test_draws_follow_the_density(self) -> None:
        sampler = schedule_sampler(create(), "speed", generator=torch.Generator().manual_seed(1))
        num_draws = 40_000
        t, _ = sampler.sample(num_draws, "cpu")
        # P(t >= 700) of `speed` at T = 1000 is 300 / (1000 + 4 * 700); 4 sigma of a binomial frequency.
        expected = 300 / 3800
        tolerance = 4 * (expected * (1 - expected) / num_draws) ** 0.5
        assert float((t >= 700).float().mean()) == pytest.approx(expected, abs=tolerance)

    def test_the_generator_decides(self) -> None:
        samplers = [schedule_sampler(create(), generator=torch.Generator().manual_seed(4)) for _ in range(2)]
        first, second = (sampler.sample(16, "cpu")[0] for sampler in samplers)
        assert torch.equal(first, second)

    def test_weights_is_the_density(self) -> None:
        sampler = schedule_sampler(create(), "speedit")
        assert np.array_equal(sampler.weights(), sampler.policy.density.numpy())

    def test_a_host_that_never_calls_training_losses_is_told(self) -> None:
        sampler = schedule_sampler(create(), "speedit")
        sampler.sample(4, "cpu")
        with pytest.raises(ValueError, match="drew twice and never called training_losses"):
            sampler.sample(4, "cpu")


class TestRefusals:
    def test_data_for_a_policy_that_weighs_the_whole_loss(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(TimestepPolicy, "needs_data", True)
        schedule_sampler(create(), "uniform")
        with pytest.raises(ValueError, match="only for a policy of scope 'mse'"):
            schedule_sampler(create(), dict(density="uniform", weighting="constant", scope="loss"))

    def test_a_redrawing_policy(self) -> None:
        diffusion = with_policy(create(), "speedit")
        with pytest.raises(ValueError, match="SpacedDiffusion has a policy already"):
            schedule_sampler(diffusion)

    def test_a_policy_for_another_schedule(self) -> None:
        policy = build_policy("speedit", NoiseSchedule.linear(500))
        with pytest.raises(ValueError, match="built for T = 500, got a diffusion object with 1000 timesteps"):
            schedule_sampler(create(), policy)

    def test_a_redraw_inside_a_package_of_two_losses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SpacedDiffusion, "__module__", "masked_diffusion.respace")
        with pytest.raises(ValueError, match="trains two losses at one t.*schedule_sampler"):
            with_policy(create())

    def test_a_loss_without_mse(self) -> None:
        diffusion = create(loss_type=LossType.KL)
        sampler = schedule_sampler(diffusion, "speedit")
        t, _ = sampler.sample(6, "cpu")
        with pytest.raises(ValueError, match="have no mse to weight"):
            diffusion.training_losses(model, torch.zeros(IMAGES), t)


class TestBuiltInWeights:
    def test_a_plain_host_has_none(self) -> None:
        # The squared error is 1 up to the host's own arithmetic. Here that is exact.
        assert torch.equal(built_in_weights(create(), torch.tensor([0, 500])), torch.ones(2))

    def test_min_snr_is_reported(self) -> None:
        with pytest.warns(UserWarning, match=r"weighs its mse already \(0.0005 at t = 0, .*multiply on top"):
            schedule_sampler(create(MaskedDiffusion), "speedit")

    @pytest.mark.filterwarnings("error")
    def test_no_warning_without_weights_of_our_own(self) -> None:
        config = dict(density="thinned", weighting="constant")
        schedule_sampler(create(MaskedDiffusion), config)
        schedule_sampler(create(), "speedit")

    def test_no_random_number_is_drawn(self) -> None:
        state = torch.get_rng_state()
        built_in_weights(create(MaskedDiffusion), torch.tensor([3]))
        assert torch.equal(torch.get_rng_state(), state)


class TestLearning:
    def test_losses_of_all_weights_reach_the_policy(self) -> None:
        sampler = schedule_sampler(create(), "loss_second_moment", host_class=LossAwareSampler)
        assert isinstance(sampler, LossAwareSampler)
        before = sampler.policy.state_dict()["density"]
        t, _ = sampler.sample(6, "cpu")
        sampler.update_with_local_losses(t, torch.full((6,), 2.0))
        sampler.update_with_all_losses(t.tolist(), [2.0] * 6)
        after = sampler.policy.state_dict()["density"]
        assert str(before) != str(after)

    def test_a_sampler_that_is_told_no_loss_is_refused(self) -> None:
        # The host tells its losses to its LossAwareSampler alone.
        sampler = schedule_sampler(create(), "loss_second_moment")
        sampler.sample(6, "cpu")
        with pytest.raises(ValueError, match="told no loss, from which 'loss_second_moment' learns"):
            sampler.sample(6, "cpu")

    def test_two_draws_before_two_losses(self) -> None:
        config = {"type": "clts", "curriculum_steps": 4, "weighting": "inverse_density"}
        diffusion = create()
        sampler, drawn = schedule_sampler(diffusion, config), []
        diffusion.training_losses(model, torch.zeros(IMAGES), sampler.sample(6, "cpu")[0])
        for _ in range(2):
            t, _ = sampler.sample(6, "cpu")
            drawn.append((t, sampler.policy.weight.float()))
        x, noise = torch.randn(IMAGES), torch.randn(IMAGES)
        for t, weight in (*drawn, (drawn[0][0].clone(), drawn[0][1])):
            terms = diffusion.training_losses(model, x, t, noise=noise)
            assert torch.equal(terms["loss"], weight[t] * terms["mse"] + terms["vb"])

    def test_losses_that_are_computed_again_have_their_weights(self) -> None:
        diffusion = create()
        sampler = schedule_sampler(diffusion, {"type": "speedit", "normalize": "loss"})
        states, losses = [], []
        for is_reentrant in (False, True):
            t, _ = sampler.sample(6, "cpu")
            x = torch.randn(IMAGES, requires_grad=True)

            def loss_of(x: torch.Tensor, t: torch.Tensor = t) -> torch.Tensor:
                losses.append(diffusion.training_losses(model, x, t, noise=torch.ones(IMAGES))["loss"])
                return losses[-1].sum()

            with set_checkpoint_early_stop(False):
                loss = checkpoint(loss_of, x, use_reentrant=is_reentrant)
                states.append(str(sampler.policy.state_dict()))
                loss.backward()
            assert str(sampler.policy.state_dict()) == states[-1]
            assert torch.equal(losses[-1], losses[-2])
        assert states[0] != states[1]

    def test_in_scope_mse_the_object_reports_them(self) -> None:
        diffusion = create()
        config = dict(density="loss_second_moment", weighting="constant")
        sampler = schedule_sampler(diffusion, config)
        t, _ = sampler.sample(6, "cpu")
        before = str(sampler.policy.state_dict())
        sampler.update_with_local_losses(t, torch.ones(6))
        assert str(sampler.policy.state_dict()) == before
        diffusion.training_losses(model, torch.zeros(IMAGES), t)
        assert str(sampler.policy.state_dict()) != before

    def test_weights_follow_a_policy_that_learns(self) -> None:
        diffusion = create()
        config = dict(density=dict(type="clts", curriculum_steps=2), weighting="inverse_density")
        sampler = schedule_sampler(diffusion, config)
        x = torch.randn(IMAGES)
        for _ in range(3):
            t, _ = sampler.sample(6, "cpu")
            noise = torch.randn(IMAGES)
            terms = diffusion.training_losses(model, x, t, noise=noise)
            direct = sampler.policy.weight.float()[t] * terms["mse"] + terms["vb"]
            assert torch.equal(terms["loss"], direct)


def test_one_t_serves_two_losses() -> None:
    diffusion = create(MaskedDiffusion)
    with pytest.warns(UserWarning, match="Min-SNR"):
        sampler = schedule_sampler(diffusion, "speedit", host_class=ScheduleSampler)
    t, _ = sampler.sample(6, "cpu")
    x, noise = torch.randn(IMAGES), torch.randn(IMAGES)
    first, second = (diffusion.training_losses(model, x, t, noise=noise) for _ in range(2))
    assert torch.equal(first["loss"], second["loss"])
    assert isinstance(sampler, ScheduleSampler)
    assert type(without_policy(diffusion)) is MaskedDiffusion


def test_a_training_loss_of_a_draw_without_gradients_is_refused() -> None:
    diffusion = create()
    sampler, x = schedule_sampler(diffusion, "speedit"), torch.zeros(IMAGES)
    t, _ = sampler.sample(len(x), "cpu")
    with torch.no_grad():
        diffusion.training_losses(model, x, sampler.sample(len(x), "cpu")[0])
    # The validation in between has left the first draw to its loss.
    diffusion.training_losses(model, x, t)
    with torch.no_grad():
        t, _ = sampler.sample(len(x), "cpu")
    with pytest.raises(ValueError, match=r"drawn under torch\.no_grad\(\)"):
        diffusion.training_losses(model, x, t)
