"""Seam B beyond the contract of test_conformance.py: options, compiled models, errors."""

import doctest
import os
from typing import Any

import pytest
import torch
from conformance.models import SmallModel
from conformance.seam import new_process
from host_standins import (
    IMAGES,
    LossType,
    MaskedDiffusion,
    PixArtDiffusion,
    SpacedDiffusion,
    create,
    create_points,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import speedit_plugins
from speedit_plugins import NoiseSchedule, build_policy, policy_of, with_policy
from speedit_plugins.hosts import entry
from speedit_plugins.hosts.attachment import Attachment, attach, attachment_of, is_attached, without_policy
from speedit_plugins.hosts.objects.diffusion_object import steered_methods
from speedit_plugins.hosts.schedule_sampler import schedule_sampler

ZEROS = torch.zeros(6, dtype=torch.long)


def drawn(policy: str = "speedit", seed: int = 7) -> Any:
    """The first draw of an object with a generator of this seed."""
    generator = torch.Generator().manual_seed(seed)
    return build_policy(policy, NoiseSchedule.from_alphas_cumprod(create().alphas_cumprod)).draw(
        6, generator=generator
    )


def terms(diffusion: Any, model: Any, t: Tensor = ZEROS, **kwargs: Any) -> Any:
    x, noise = torch.linspace(-1, 1, 384).view(IMAGES), torch.linspace(2, -2, 384).view(IMAGES)
    return diffusion.training_losses(model, x, t, noise=noise, **kwargs)


def test_it_is_exported() -> None:
    assert speedit_plugins.with_policy is with_policy


def test_its_example_runs() -> None:
    result = doctest.testmod(entry)
    assert (result.failed, result.attempted > 0) == (0, True)


class TestDraws:
    def test_the_same_object_comes_back(self) -> None:
        diffusion = create()
        assert with_policy(diffusion, "speed") is diffusion
        assert type(diffusion).__name__ == "SpacedDiffusion"

    def test_t_by_name_and_by_position(self) -> None:
        model = SmallModel(1)
        diffusion = with_policy(create(), generator=torch.Generator().manual_seed(7))
        x = torch.zeros(IMAGES)
        diffusion.training_losses(model, x_start=x, t=ZEROS)
        assert torch.equal(model.seen[0], drawn().index)

    def test_the_dtype_of_t_is_the_hosts(self) -> None:
        class Reads(SpacedDiffusion):
            def training_losses(self, model: Any, x: Any, t: Any, **kwargs: Any) -> Any:
                self.dtype = t.dtype
                return super().training_losses(model, x, t.long(), **kwargs)

        diffusion = with_policy(create(Reads))
        terms(diffusion, SmallModel(1), ZEROS.int())
        assert diffusion.dtype is torch.int32

    def test_an_evaluation_is_at_the_t_that_is_given(self) -> None:
        model, diffusion = SmallModel(1), with_policy(create())
        t = torch.full((6,), 900)
        with torch.no_grad():
            ours = terms(diffusion, model, t)
        assert torch.equal(model.seen[0], t)
        assert torch.equal(ours["loss"], terms(create(), model, t)["loss"])
        assert attachment_of(diffusion).num_calls == 0

    def test_by_default_draws_follow_the_hosts_seed(self) -> None:
        first, second = SmallModel(1), SmallModel(1)
        for model in (first, second):
            torch.manual_seed(11)
            new_process()
            terms(with_policy(create()), model)
        assert torch.equal(first.seen[0], second.seen[0])

    def test_a_call_that_is_computed_again_without_its_seed_is_refused(self) -> None:
        diffusion, x = with_policy(create()), torch.zeros(IMAGES)

        def loss_of(x: Tensor) -> Tensor:
            t = torch.randint(1000, (len(x),))
            return diffusion.training_losses(SmallModel(1), x + 1, t)["loss"].sum()

        options = {"use_reentrant": False, "preserve_rng_state": False}
        loss = checkpoint(loss_of, x.requires_grad_(), **options)
        with pytest.raises(ValueError, match="neither its data nor its timesteps are those of one call"):
            loss.backward()

    def test_a_loss_that_is_not_the_mse_in_a_reentrant_checkpoint_is_refused(self) -> None:
        class Doubled(SpacedDiffusion):
            def terms(self, answer: Any, noise: Any, t: Any) -> Any:
                terms = super().terms(answer, noise, t)
                return {**terms, "loss": 2 * terms["loss"]}

        diffusion = with_policy(create(Doubled))
        with pytest.raises(ValueError, match="call checkpoint with use_reentrant=False"):
            checkpoint(
                lambda x: diffusion.training_losses(SmallModel(1), x, ZEROS)["loss"].sum(),
                torch.zeros(IMAGES, requires_grad=True),
                use_reentrant=True,
            )

    def test_a_curriculum_advances_with_the_calls(self) -> None:
        policy = dict(type="clts", curriculum_steps=2)
        diffusion = with_policy(create(), policy)
        density = attachment_of(diffusion).policy.density
        for _ in range(3):
            terms(diffusion, SmallModel(1))
        moved = attachment_of(diffusion).policy.density
        assert not torch.allclose(density, moved)

    def test_a_learning_policy_is_told_the_unweighted_losses(self) -> None:
        diffusion = with_policy(create(), "loss_second_moment")
        told: list[tuple[Tensor, Tensor]] = []
        attachment_of(diffusion).policy.update = lambda index, loss: told.append((index, loss))
        model = SmallModel(1)
        terms(diffusion, model)
        (index, loss), plain = told[0], terms(create(), model, model.seen[0])
        assert torch.equal(index, model.seen[0])
        assert torch.equal(loss, plain["loss"])
        assert not loss.requires_grad


class TestLoss:
    def test_terms_added_by_the_host_are_kept(self) -> None:
        """A loss that is not mse + vb changes by what the weight changes of the mse."""

        class Masked(PixArtDiffusion):
            mae = 0.25

        diffusion = with_policy(create(Masked), generator=torch.Generator().manual_seed(7))
        ours = terms(diffusion, SmallModel(1))
        weight = drawn().weight
        direct = weight * ours["mse"] + ours["vb"] + 0.25
        # The host's sum and ours each round once in float32.
        assert torch.allclose(ours["loss"], direct, rtol=2e-7, atol=2e-7)

    def test_scope_loss_weighs_all_of_it(self) -> None:
        policy = dict(density="uniform", weighting="p2", scope="loss")
        diffusion = with_policy(create(), policy)
        model = SmallModel(1)
        ours, plain = terms(diffusion, model), terms(create(), model, model.seen[0])
        weight = attachment_of(diffusion).policy.weight.float()[model.seen[0]]
        assert torch.equal(ours["loss"], weight * plain["loss"])
        assert torch.equal(ours["vb"], plain["vb"])

    def test_gradients_are_weighted(self) -> None:
        ours, plain = SmallModel(1), SmallModel(1)
        diffusion = with_policy(create(), generator=torch.Generator().manual_seed(7))
        terms(diffusion, ours)["loss"].sum().backward()
        weight = drawn().weight
        host = terms(create(), plain, drawn().index)
        (weight * host["mse"] + host["vb"]).sum().backward()
        assert torch.equal(ours.scale.grad, plain.scale.grad)

    def test_a_kl_loss_has_no_mse(self) -> None:
        diffusion = with_policy(create(loss_type=LossType.KL))
        with pytest.raises(ValueError, match=r"terms \['loss'\] have no mse to weight"):
            terms(diffusion, SmallModel(1))

    def test_a_method_that_returns_no_loss(self) -> None:
        """PixArt's distillation calls the same method for predictions."""

        class Predicts(SpacedDiffusion):
            def terms(self, answer: Any, noise: Any, t: Any) -> Any:
                return answer, noise

        with pytest.raises(ValueError, match="returns tuple, wanted a loss .* or a dict"):
            terms(with_policy(create(Predicts)), SmallModel(1))

    def test_a_loss_without_terms(self) -> None:
        diffusion = with_policy(create_points(), generator=torch.Generator().manual_seed(7))
        model, x = SmallModel(None), torch.randn(6, 3, 8)
        noise = torch.randn(6, 3, 8)
        loss = diffusion.p_losses(denoise_fn=model, data_start=x, t=ZEROS, noise=noise)
        plain = create_points().p_losses(model, x, model.seen[0], noise)
        weight = attachment_of(diffusion).policy.weight.float()[model.seen[0]]
        assert torch.equal(loss, weight * plain)


class TestModels:
    @pytest.mark.slow
    @pytest.mark.skipif(os.name == "nt", reason="needs a C++ compiler")
    def test_a_compiled_model(self) -> None:
        def model(x: Tensor, t: Tensor) -> Tensor:
            answer = torch.sin(x + 0.01 * t.view(-1, 1, 1, 1))
            return torch.cat([answer, 0.3 * answer], dim=1)

        results = []
        for given in (model, torch.compile(model)):
            diffusion = with_policy(create(), generator=torch.Generator().manual_seed(7))
            results.append(terms(diffusion, given)["loss"])
        # The compiler may fuse the sine's argument. That changes a few float32 roundings.
        assert torch.allclose(*results, rtol=1e-5)


class PerFrame:
    """A host whose t may be (B, F), and whose loss is one for each frame, or for each sample."""

    alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
    model_mean_type = "epsilon"

    def __init__(self, *, is_mean: bool) -> None:
        self.is_mean = is_mean

    def training_losses(self, model: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        self.seen = t
        mse = x**2
        mse = mse.mean(1) if self.is_mean else mse
        return {"mse": mse, "loss": mse}


FRAMES = torch.tensor([[1, 2, 3, 4]] * 6)
ONES = torch.ones(6, 4)


class TestShapesOfT:
    def trained(self, t: Any, policy: Any = "speedit", *, is_mean: bool = True) -> tuple[PerFrame, Tensor]:
        host = with_policy(PerFrame(is_mean=is_mean), policy)
        return host, host.training_losses(None, ONES, t)["loss"]

    def test_each_frame_has_a_draw_and_a_weight(self) -> None:
        host, loss = self.trained(FRAMES, is_mean=False)
        assert host.seen.shape == (6, 4)
        assert len(host.seen.unique()) > 4
        assert torch.equal(loss, policy_of(host).weight.float()[host.seen])

    @pytest.mark.parametrize("t", [FRAMES[:, :1], FRAMES[:, :1].expand(6, 4)], ids=["B, 1", "shared"])
    def test_frames_that_share_a_t_have_one_draw(self, t: Tensor) -> None:
        host, loss = self.trained(t)
        assert host.seen.shape == t.shape
        assert bool((host.seen == host.seen[:, :1]).all())
        assert len(host.seen[:, 0].unique()) > 1
        assert torch.equal(loss, policy_of(host).weight.float()[host.seen[:, 0]])

    def test_one_loss_for_frames_of_several_weights_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"shape \(6,\), wanted one value for each drawn t, \(6, 4\)"):
            self.trained(FRAMES)
        for policy in ("loss_second_moment", {"type": "uniform", "normalize": "loss"}):
            with pytest.raises(ValueError, match="wanted one value for each drawn t"):
                self.trained(FRAMES, policy)
        host, loss = self.trained(FRAMES, "logit_normal")
        assert len(host.seen.unique()) > 4
        assert torch.equal(loss, torch.ones(6))

    @pytest.mark.parametrize(
        ("t", "got"), [(torch.tensor(3), r"got shape \(\)"), ([1] * 6, "got a list"), (3, "got a int")]
    )
    def test_what_is_no_batch_of_timesteps_is_refused(self, t: Any, got: str) -> None:
        with pytest.raises(ValueError, match=got):
            self.trained(t)


class TestErrors:
    def test_guided_diffusion_has_its_sampler(self) -> None:
        guided = type("GaussianDiffusion", (SpacedDiffusion,), {"__module__": "guided_diffusion.respace"})
        with pytest.raises(ValueError, match="logs its losses by the t of its schedule sampler"):
            with_policy(create(guided))

    def test_a_policy_for_another_schedule(self) -> None:
        policy = build_policy("speedit", NoiseSchedule.linear(500))
        with pytest.raises(ValueError, match="built for T = 500, got a diffusion object with 1000 timesteps"):
            with_policy(create(), policy)

    def test_a_policy_on_another_schedule_of_the_same_length(self) -> None:
        policy = build_policy("speedit", NoiseSchedule.scaled_linear(1000))
        with pytest.raises(ValueError, match=r"built for NoiseSchedule\(.*\), got a diffusion object with"):
            with_policy(create(), policy)

    def test_weights_beside_pixarts_snr_loss(self) -> None:
        diffusion = create(PixArtDiffusion)
        diffusion.snr = True
        with pytest.raises(ValueError, match="snr_loss weighs its loss already, .* set snr_loss=False"):
            with_policy(diffusion)
        assert is_attached(with_policy(diffusion, dict(density="logit_normal", weighting="constant")))

    def test_a_mean_over_the_batch_cannot_be_weighed(self) -> None:
        class Mean(SpacedDiffusion):
            def terms(self, answer: Any, noise: Any, t: Any) -> Any:
                return {name: term.mean() for name, term in super().terms(answer, noise, t).items()}

        message = r"loss has shape \(\), wanted one value for each drawn t, \(6,\): neither the mean"
        for policy in ("speedit", "loss_second_moment"):
            with pytest.raises(ValueError, match=message):
                terms(with_policy(create(Mean), policy), SmallModel(1))

    def test_a_prediction_type_beside_a_built_policy(self) -> None:
        policy = build_policy("speedit", NoiseSchedule.linear(1000))
        for attached in (with_policy, schedule_sampler):
            with pytest.raises(ValueError, match="'speedit' is built for a prediction type already"):
                attached(create(), policy, prediction_type="v")

    def test_a_loss_of_the_whole_batch_is_sent_to_its_own_seam(self) -> None:
        diffusion = create_points()
        diffusion.parameterization, diffusion.l_simple_weight = "eps", 1.0
        with pytest.raises(ValueError, match="name speedit_plugins.hosts.latent_diffusion.PointDiffusion as"):
            with_policy(diffusion)

    def test_a_policy_of_the_same_schedule_is_taken_as_it_is(self) -> None:
        policy = build_policy("speedit", NoiseSchedule.linear(1000))
        assert attachment_of(with_policy(create(), policy)).policy is policy

    def test_a_failed_attempt_leaves_the_object_alone(self) -> None:
        diffusion = create()
        with pytest.raises(ValueError, match="unknown policy 'sped'"):
            with_policy(diffusion, "sped")
        assert type(diffusion) is SpacedDiffusion
        assert not is_attached(diffusion)

    def test_without_a_policy_there_is_none_to_remove(self) -> None:
        with pytest.raises(ValueError, match="SpacedDiffusion has no policy to remove"):
            without_policy(create())

    def test_an_object_without_the_seam(self) -> None:
        message = (
            "builtins.object has no seam: looked for a method training_losses,"
            " training_losses_diffusers, p_losses with an argument t or timestep"
        )
        with pytest.raises(ValueError, match=message):
            with_policy(object())

    def test_an_attachment_is_put_in_once(self) -> None:
        diffusion = create(MaskedDiffusion)
        attachment = Attachment(build_policy("uniform", NoiseSchedule.linear()))
        assert attachment_of(attach(diffusion, attachment, steered_methods)) is attachment
        with pytest.raises(
            ValueError, match="has a policy already, from a line of yours .* speedit_plugins.without_policy"
        ):
            attach(diffusion, attachment, steered_methods)

    def test_the_prediction_type_can_be_stated(self) -> None:
        diffusion = create()
        del diffusion.model_mean_type
        with pytest.raises(ValueError, match="pass prediction_type"):
            with_policy(diffusion)
        assert is_attached(with_policy(diffusion, "min_snr", prediction_type="x0"))

    def test_a_type_that_contradicts_the_object_is_refused(self) -> None:
        for attached in (with_policy, schedule_sampler):
            with pytest.raises(
                ValueError, match="predicts epsilon, got prediction_type='v'; wanted 'epsilon'"
            ):
                attached(create(), "min_snr", prediction_type="v")
            attached(create(), "min_snr", prediction_type="epsilon")


def test_a_reported_mse_that_is_no_part_of_the_loss_is_refused() -> None:
    class Detached(SpacedDiffusion):
        def terms(self, answer: Any, noise: Any, t: Any) -> Any:
            found = super().terms(answer, noise, t)
            return {**found, "mse": found["mse"].detach()}

    diffusion = with_policy(create(Detached), "speedit")
    with pytest.raises(ValueError, match="not made of the tensor that it reports as mse"):
        terms(diffusion, SmallModel(1))
