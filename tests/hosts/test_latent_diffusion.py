"""latent-diffusion and Stable Diffusion: the contract on a stand-in, configs, options, errors."""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conformance.latent_diffusion import (
    ELBO,
    HOST,
    L_SIMPLE,
    PLUGIN,
    SHAPE,
    SMALL_STAGE,
    WHOLE,
    LatentSeam,
)
from conformance.points import check
from conformance.seam import seeded
from latent_diffusion_standin import DDPM, LatentDiffusion, installed, instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream

SPEED_YAML = Path(__file__).parents[2] / "integrations/latent_diffusion/speed.yaml"
CHECKOUTS = ("CompVis+latent-diffusion", "CompVis+stable-diffusion", "Stability-AI+stablediffusion")
CLASS = f"{PLUGIN}.LatentDiffusion"


def made(ddpm: ModuleType, name: str, policy: Any = None, **options: Any) -> Any:
    """A small object of the host's class; with a policy, of ours."""
    given = options if policy is None else {"policy": policy, **options}
    return LatentSeam(ddpm, name).make(**given)


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Data, conditioning (B, 1) and noise."""
    x, noise = LatentSeam(ModuleType("")).batch()
    return x, x.flatten(1)[:, :1].abs(), noise


def step_of(model: Any, generator: torch.Generator | None = None, t: Any = None) -> Any:
    """Loss and terms of one step, at the t that the host draws or is given."""
    if generator is not None:
        attachment_of(model).stream = DrawStream(generator)
    x, c, noise = batch()
    inputs = (x, c) if hasattr(model, "cond_stage_key") else (x,)
    return model(*inputs, noise=noise) if t is None else model.p_losses(*inputs, t, noise=noise)


@pytest.fixture
def ddpm() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def test_the_contract_holds_on_the_stand_in(ddpm: ModuleType) -> None:
    assert check(LatentSeam(ddpm)) == list(range(1, 12))


class TestTheContractCanFail:
    def test_a_host_that_shows_its_model_another_t_breaks_point_1(
        self, ddpm: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            ddpm.DiffusionWrapper, "forward", lambda self, x, t: self.diffusion_model(x, t * 0 + 3)
        )
        with pytest.raises(AssertionError, match="point 1, draws_are_seen: drew .* the model saw"):
            check(LatentSeam(ddpm))

    def test_weights_on_both_terms_break_point_2(
        self, ddpm: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def weigh(self: Any, error: Any) -> Any:
            self.plain.append(error)
            self.weighed.append(self.draw.weight.to(error.dtype).view(-1, 1, 1, 1) * error)
            return self.weighed[-1]

        monkeypatch.setattr(import_module(PLUGIN)._WeighedErrors, "weigh", weigh)
        with pytest.raises(AssertionError, match=r"point 2, loss_is_weighted: loss misses w \* mse \+ vb"):
            check(LatentSeam(ddpm), {2: LatentSeam.contract[2]})


@pytest.mark.hosts
@pytest.mark.parametrize("name", CHECKOUTS)
def test_the_example_merges_over_the_hosts_configs(name: str) -> None:
    merged = 0
    for path in sorted((_checkout(name) / "configs").rglob("*.yaml")):
        config: Any = OmegaConf.load(path)
        if config.get("model", {}).get("target") != f"{HOST}.LatentDiffusion":
            continue
        model = OmegaConf.merge(config, OmegaConf.load(SPEED_YAML)).model
        assert model.target == CLASS
        assert model.params.pop("policy") == {"type": "speedit"}
        assert model.params == config.model.params
        merged += 1
    assert merged >= 3


def _checkout(name: str) -> Path:
    checkout = Path(os.environ["SPEEDIT_HOSTS"]) / name
    if not checkout.is_dir():
        pytest.skip(f"no checkout {name}")
    return checkout


class TestConfig:
    def test_the_example_builds_the_host_s_class_with_the_policy(self, ddpm: ModuleType) -> None:
        params = {
            "unet_config": {"target": "conformance.models.ConditionedUnet"},
            "first_stage_config": SMALL_STAGE,
            "cond_stage_config": "__is_first_stage__",
            "timesteps": 500,
            "linear_end": 0.04,
        }
        hosts = OmegaConf.create({"model": {"target": f"{HOST}.LatentDiffusion", "params": params}})
        model = instantiate(OmegaConf.merge(hosts, OmegaConf.load(SPEED_YAML)).model)
        assert isinstance(model, ddpm.LatentDiffusion)
        assert type(model).__name__ == "LatentDiffusion"
        assert (model.policy.name, model.policy.schedule.num_timesteps) == ("speedit", 500)

    def test_options_reach_the_policy(self, ddpm: ModuleType) -> None:
        config = OmegaConf.create(
            {"density": {"type": "thinned", "k": 2.0, "tau": 600}, "weighting": "constant"}
        )
        policy = made(ddpm, "DDPM", config).policy
        # Half as often from 600 on.
        assert_close(policy.density[700] / policy.density[500], torch.tensor(0.5, dtype=torch.float64))
        assert policy.boundary_index == 600

    def test_the_target_of_the_host_reaches_the_policy(self, ddpm: ModuleType) -> None:
        snr = made(ddpm, "DDPM", "min_snr").policy.schedule.snr
        weights = [
            made(ddpm, "DDPM", "min_snr", parameterization=each).policy.weight for each in ("eps", "x0", "v")
        ]
        # min(SNR, 5) weighs the error in x0. The error in noise gets it over SNR, the one in v over SNR + 1.
        clipped = snr.clamp(max=5.0)
        for weight, scale in zip(weights, (snr, torch.ones_like(snr), snr + 1), strict=True):
            assert_close(weight, clipped / scale)

    @pytest.mark.parametrize(
        ("policy", "message"), [("spedit", "did you mean 'speedit'"), (3, "a name or a mapping")]
    )
    def test_a_bad_policy_fails_in_the_constructor(self, ddpm: ModuleType, policy: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            made(ddpm, "LatentDiffusion", policy)

    def test_an_unconditional_model_has_no_use_for_a_shortened_schedule(self, ddpm: ModuleType) -> None:
        options = {"cond_stage_config": "__is_unconditional__", "num_timesteps_cond": 2}
        model = made(ddpm, "LatentDiffusion", "speedit", **options)
        assert model.shorten_cond_schedule
        assert model.policy.name == "speedit"

    def test_an_unknown_class_is_an_attribute_error_with_the_known(self, ddpm: ModuleType) -> None:
        with pytest.raises(AttributeError, match="known: DDPM, LatentDiffusion, LatentInpaintDiffusion"):
            import_module(PLUGIN).DiffusionWrapper  # noqa: B018 - the access is what raises
        assert import_module(PLUGIN).DDPM is import_module(PLUGIN).DDPM


class TestTraining:
    def test_a_learning_policy_sees_the_unweighted_losses(self, ddpm: ModuleType) -> None:
        for name in ("DDPM", "LatentDiffusion"):
            model = made(ddpm, name, WHOLE)
            told: list[Any] = []
            model.policy.update = lambda index, loss, told=told: told.append((index, loss))
            step_of(model, generator=seeded())
            ((index, loss),) = told
            assert not loss.requires_grad
            _, terms = step_of(made(ddpm, name), t=index)
            # The mean of what the policy is told is the host's loss, up to float32 sums of 6 terms.
            assert_close(loss.mean(), terms["train/loss"].detach(), rtol=1e-6, atol=0)
            assert loss.shape == index.shape == (SHAPE[0],)

    def test_each_training_call_is_a_step_of_a_curriculum(self, ddpm: ModuleType) -> None:
        model = made(ddpm, "LatentDiffusion", {"type": "clts", "curriculum_steps": 4})
        for _ in range(3):
            step_of(model)
        step_of(model.eval())
        step_of(model.train())
        assert model.policy.state_dict() == {
            **model.policy.state_dict(),
            "num_steps": 4,
            "density": {"step": 3},
        }

    def test_the_weights_multiply_before_the_constant_of_logvar(self, ddpm: ModuleType) -> None:
        options = {"logvar_init": 0.5, "original_elbo_weight": 0.0}
        model, same = made(ddpm, "LatentDiffusion", "p2", **options), made(ddpm, "LatentDiffusion", "p2")
        same.original_elbo_weight = 0.0
        loss, _ = step_of(model, generator=seeded())
        bare, _ = step_of(same, generator=seeded())
        # The host divides each weighted error by exp(0.5) and adds 0.5, then scales by l.
        assert_close(loss, bare / torch.tensor(0.5).exp() + L_SIMPLE * 0.5)

    def test_positional_and_named_arguments_are_the_host_s(self, ddpm: ModuleType) -> None:
        model, (x, c, noise), t = made(ddpm, "LatentDiffusion", "p2"), batch(), torch.arange(SHAPE[0])
        losses = []
        for args, kwargs in (((x, c, t, noise), {}), ((x,), {"t": t, "cond": c, "noise": noise})):
            attachment_of(model).stream = DrawStream(seeded())
            losses.append(model.p_losses(*args, **kwargs)[0])
        assert torch.equal(*losses)
        with pytest.raises(TypeError, match="missing a required argument: 't'"):
            model.p_losses(x, c)


class TestAForkWithAnotherLoss:
    """A fork has the same module name. If weights do not fit its loss, it must not train silently."""

    def refused(self, p_losses: Any, message: str, base: type = LatentDiffusion) -> None:
        fork = type("LatentDiffusion", (base,), {"p_losses": p_losses})
        with installed(LatentDiffusion=fork) as ddpm:
            model = made(ddpm, "LatentDiffusion", "p2")
            with pytest.raises(ValueError, match=message):
                step_of(model)
            assert attachment_of(model).call is None

    def test_another_t(self) -> None:
        def p_losses(self: Any, x_start: Any, cond: Any, t: Any, noise: Any = None) -> Any:
            return LatentDiffusion.p_losses(self, x_start, cond, t * 0 + 3, noise)

        self.refused(p_losses, "of one error at the policy's t")

    def test_three_errors(self) -> None:
        def p_losses(self: Any, x_start: Any, cond: Any, t: Any, noise: Any = None) -> Any:
            self.get_loss(x_start, x_start, mean=False)
            return LatentDiffusion.p_losses(self, x_start, cond, t, noise)

        self.refused(p_losses, "asked get_loss 3 times")

    def test_another_second_error(self) -> None:
        def p_losses(self: Any, x_start: Any, cond: Any, t: Any, noise: Any = None) -> Any:
            error = self.get_loss(x_start, noise, mean=False).mean([1, 2, 3])
            prior = self.get_loss(x_start, x_start, mean=False).mean([1, 2, 3])
            vlb = (self.lvlb_weights[t] * prior).mean()
            loss = error.mean() + vlb
            return loss, {"train/loss_simple": error.mean(), "train/loss_vlb": vlb, "train/loss": loss}

        self.refused(p_losses, "does not sum l_simple_weight")

    def test_a_loss_with_a_third_term(self) -> None:
        def p_losses(self: Any, x_start: Any, cond: Any, t: Any, noise: Any = None) -> Any:
            error = self.get_loss(x_start, noise, mean=False).mean([1, 2, 3])
            simple, vlb = error.mean(), (self.lvlb_weights[t] * error).mean()
            loss = self.l_simple_weight * simple + self.original_elbo_weight * vlb + 1
            return loss, {"train/loss_simple": simple, "train/loss_vlb": vlb, "train/loss": loss}

        self.refused(p_losses, "does not sum l_simple_weight")

    def test_a_mean_over_the_batch(self) -> None:
        def p_losses(self: Any, x_start: Any, cond: Any, t: Any, noise: Any = None) -> Any:
            return self.get_loss(x_start, noise), {}

        self.refused(p_losses, "wanted mean=False")


class TestCheckpoint:
    def test_a_resumed_run_goes_on_where_it_was(self, ddpm: ModuleType) -> None:
        config = {"type": "clts", "curriculum_steps": 10}
        model = made(ddpm, "LatentDiffusion", config)
        for _ in range(6):
            step_of(model)
        checkpoint: dict[str, Any] = {}
        model.on_save_checkpoint(checkpoint)
        assert list(checkpoint) == ["speedit_plugins"]
        resumed = made(ddpm, "LatentDiffusion", config)
        assert not torch.equal(resumed.policy.density, model.policy.density)
        resumed.on_load_checkpoint(checkpoint)
        assert torch.equal(resumed.policy.density, model.policy.density)
        for each in (model, resumed):
            step_of(each, generator=seeded())
            assert attachment_of(each).num_calls == 7
        assert torch.equal(resumed.policy.density, model.policy.density)

    def test_it_holds_nothing_but_tensors_and_plain_values(self, ddpm: ModuleType, tmp_path: Path) -> None:
        model = made(ddpm, "DDPM", "loss_second_moment")
        checkpoint: dict[str, Any] = {}
        step_of(model)
        model.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, tmp_path / "last.ckpt")
        loaded = torch.load(tmp_path / "last.ckpt", weights_only=True)
        resumed = made(ddpm, "DDPM", "loss_second_moment")
        resumed.on_load_checkpoint(loaded)
        ours, theirs = resumed.policy.state_dict(), model.policy.state_dict()
        assert int(ours["density"]["counts"].sum()) == SHAPE[0]
        assert torch.equal(ours["density"]["losses"], theirs["density"]["losses"])

    def test_the_host_s_own_checkpoint_leaves_the_policy_new(self, ddpm: ModuleType) -> None:
        model = made(ddpm, "DDPM", "speedit")
        model.on_load_checkpoint({"state_dict": {}})
        assert attachment_of(model).num_calls == 0

    def test_another_policy_s_state_is_refused(self, ddpm: ModuleType) -> None:
        checkpoint: dict[str, Any] = {}
        made(ddpm, "DDPM", "p2").on_save_checkpoint(checkpoint)
        with pytest.raises(ValueError, match="policy state needs policy 'speedit'"):
            made(ddpm, "DDPM", "speedit").on_load_checkpoint(checkpoint)

    def test_the_host_s_hooks_run(self) -> None:
        class Hooked(DDPM):
            def on_save_checkpoint(self, checkpoint: Any) -> None:
                checkpoint["hosts"] = 1

            def on_load_checkpoint(self, checkpoint: Any) -> None:
                self.loaded = checkpoint["hosts"]

        with installed(Hooked=Hooked) as ddpm:
            model = made(ddpm, "Hooked", "p2")
            checkpoint: dict[str, Any] = {}
            model.on_save_checkpoint(checkpoint)
            model.on_load_checkpoint(checkpoint)
            assert sorted(checkpoint) == ["hosts", "speedit_plugins"]
            assert model.loaded == 1


def test_elbo_weight_of_the_contract_is_felt() -> None:
    # Point 2 compares sums. It would prove nothing if the variational term were lost in float32's rounding.
    with installed() as ddpm:
        model = made(ddpm, "LatentDiffusion")
        _, terms = step_of(model, t=torch.arange(0, 600, 100))
        share = ELBO * terms["train/loss_vlb"] / terms["train/loss"]
        assert 1e-4 < float(share.detach()) < 0.9
