"""mmagic: the contract on a stand-in, configs, options and errors."""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.mmagic import MmagicSeam, build
from conformance.models import NamedUnet
from conformance.points import check
from mmagic_standin import PLUGIN, installed
from mmengine.config import Config
from torch.testing import assert_close

ROOT = Path(__file__).parents[2]
ALL_POINTS = list(range(1, 12))
# The part of the host's config that speed_adm.py changes.
BASE = """
model = dict(
    type="AblatedDiffusionModel",
    unet=dict(type="DenoisingUnet", num_classes=1000),
    diffusion_scheduler=dict(type="EditDDIMScheduler", variance_type="learned_range"),
)
train_dataloader = dict(batch_size=None, dataset=dict(type="ImageNet", pipeline=[dict(type="PackInputs")]))
optim_wrapper = dict(constructor="MultiOptimWrapperConstructor")
"""


@pytest.fixture
def _host() -> Iterator[None]:
    with installed():
        yield


@pytest.mark.usefixtures("_host")
def test_the_contract_holds_on_the_stand_in() -> None:
    assert check(MmagicSeam()) == ALL_POINTS


@pytest.mark.usefixtures("_host")
def test_the_contract_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin: Any = import_module(PLUGIN)
    noised = plugin._Training.noised
    monkeypatch.setattr(plugin._Training, "noised", lambda self, x, n, t: noised(self, x, n, (t - 1).abs()))
    with pytest.raises(AssertionError, match="point 1, noised_sample_is_ddpms: x_t is not DDPM's"):
        check(MmagicSeam())


@pytest.mark.usefixtures("_host")
class TestConfig:
    def test_the_config_builds_through_the_hosts_registry(self, tmp_path: Path) -> None:
        ours = (ROOT / "integrations/mmagic/speed_adm.py").read_text()
        (tmp_path / "adm_ddim250_8xb32_imagenet-64x64.py").write_text(BASE)
        (tmp_path / "speed_adm.py").write_text(ours)
        config = Config.fromfile(tmp_path / "speed_adm.py")
        options = {**config.model.diffusion_scheduler, "beta_schedule": "linear"}
        scheduler = import_module("mmagic.registry").DIFFUSION_SCHEDULERS.build(options)
        assert scheduler.policy.name == "speedit"
        assert config.model.unet == {
            "type": "DenoisingUnet",
            "num_classes": 0,
            "output_cfg": {"mean": "eps", "var": "fixed"},
        }
        assert config.train_dataloader.dataset.pipeline[-1] == {"type": "PackInputs", "keys": "gt"}
        assert config.optim_wrapper.constructor == "MultiOptimWrapperConstructor"
        # A runner writes its config to a file and reads it again.
        assert Config.fromstring(config.dump(), ".py").model == config.model

    def test_policy_options_reach_the_policy(self) -> None:
        policy = build(policy={"type": "speed", "k": 4}).policy
        # k times more before tau = 700 of the linear schedule than from there on: the paper's density.
        assert_close(policy.density[699] / policy.density[700], torch.tensor(4.0).double())

    def test_host_options_reach_the_host(self) -> None:
        betas = [0.1, 0.2, 0.3]
        scheduler = build(policy="p2", num_train_timesteps=3, trained_betas=betas, clip_sample=False)
        assert_close(scheduler.policy.schedule.alpha**2, torch.from_numpy(np.cumprod(1 - np.array(betas))))
        assert scheduler.clip_sample is False

    def test_other_registrations_stay(self) -> None:
        registry = import_module("mmagic.registry").DIFFUSION_SCHEDULERS
        before = dict(registry.module_dict)
        import_module(PLUGIN)
        added = dict(registry.module_dict)
        assert added.pop("SpeeDiffusion").__module__ == PLUGIN
        assert added == before


@pytest.mark.usefixtures("_host")
class TestTraining:
    def test_seen_t_follows_the_policy(self) -> None:
        model, n, scheduler = NamedUnet(), 20_000, build()
        scheduler.training_loss(model, torch.zeros(n, 1, 1, 1))
        with torch.no_grad():
            loss = scheduler.training_loss(model, torch.zeros(n, 1, 1, 1), noise=torch.ones(n, 1, 1, 1))
        # The mass of t >= 642 of the linear schedule's speedit density, and without gradients of a uniform
        # one; 4 sigma of a binomial frequency.
        for seen, mass in zip(model.seen, (0.0509, 0.358), strict=True):
            share = float((seen >= 642).double().mean())
            assert abs(share - mass) < 4 * math.sqrt(mass * (1 - mass) / n)
        assert_close(loss["loss"], (model.answers[1] - 1).square().mean())
        assert scheduler._speedit_attachment.num_calls == 1

    def test_a_learning_policy_learns_from_unweighted_losses(self) -> None:
        scheduler = build(policy="loss_second_moment", num_train_timesteps=2, trained_betas=[0.1, 0.2])
        told: list[tuple[torch.Tensor, torch.Tensor]] = []
        scheduler.policy.update = lambda index, loss: told.append((index, loss))
        model, x = NamedUnet(), torch.zeros(3, 1, 2, 2)
        scheduler.training_loss(model, x, noise=torch.ones_like(x))
        ((index, loss),) = told
        assert torch.equal(index, model.seen[0])
        assert_close(loss, (model.answers[0] - 1).square().mean((1, 2, 3)))

    def test_each_call_is_a_step_of_a_curriculum(self) -> None:
        scheduler = build(policy="clts")
        for _ in range(3):
            scheduler.training_loss(NamedUnet(), torch.zeros(2, 1, 1, 1))
        assert scheduler.policy.state_dict()["density"] == {"step": 2}

    def test_a_given_t_is_kept_and_moves_no_policy(self) -> None:
        scheduler, model, t = build(), NamedUnet(), torch.tensor([0, 999])
        x = torch.zeros(2, 1, 2, 2)
        loss = scheduler.training_loss(model, x, t, noise=torch.ones_like(x))["loss"]
        assert torch.equal(model.seen[0], t)
        assert_close(loss, (model.answers[0] - 1).square().mean())
        assert scheduler._speedit_attachment.num_calls == 0

    def test_half_precision_errors_do_not_overflow(self) -> None:
        # 300 squared is past float16's 65504.
        x = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
        answer = torch.full_like(x, 300.0)
        terms = build().training_loss(lambda *_: answer, x, torch.tensor([0]), noise=torch.zeros_like(x))
        assert terms["loss"] == 90_000
        assert terms["loss"].dtype == torch.float32

    def test_the_hosts_add_noise_takes_no_batch(self) -> None:
        # This is why the plugin has its own. If this raises no more, the host's is enough.
        with pytest.raises(TypeError, match="unsupported operand"):
            build().add_noise(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.tensor([1, 2]))


@pytest.mark.usefixtures("_host")
class TestErrors:
    def test_options(self) -> None:
        with pytest.raises(ValueError, match="did you mean 'speedit'"):
            build(policy="spedit")
        with pytest.raises(TypeError, match="noise_shedule"):
            build(noise_shedule="linear")
        with pytest.raises(ValueError, match="got 2 trained_betas, wanted num_train_timesteps=1000"):
            build(trained_betas=[0.1, 0.2])

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            ({"img": 1}, r"got dict with keys \['img'\]: PackInputs"),
            (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), r"got \(2, 3, 4, 4\) of torch.uint8"),
            (torch.tensor(1.0), r"got \(\) of torch.float32"),
        ],
    )
    def test_images(self, x: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build().training_loss(NamedUnet(), x)

    @pytest.mark.parametrize(
        ("t", "message"),
        [
            (5, r"needs t int64 \(2,\) or None, got 5"),
            (torch.tensor([1.0, 2.0]), r"got \(2,\) of torch.float32"),
            (torch.tensor([1]), r"got \(1,\) of torch.int64"),
            (torch.tensor([-1, 2]), r"needs t in \[0, 1000\), got -1 to 2"),
            (torch.tensor([0, 1000]), r"needs t in \[0, 1000\), got 0 to 1000"),
        ],
    )
    def test_timesteps(self, t: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build().training_loss(NamedUnet(), torch.zeros(2, 1, 1, 1), t)

    def test_shapes(self) -> None:
        x = torch.zeros(2, 1, 2, 2)
        with pytest.raises(ValueError, match=r"needs noise to give \(2, 1, 2, 2\), as x_0, got \(2, 1\)"):
            build().training_loss(NamedUnet(), x, noise=torch.zeros(2, 1))
        with pytest.raises(ValueError, match="needs the model to give .* got tuple"):
            build().training_loss(lambda *_: (x,), x)


def test_needs_mmagic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mmagic", None)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    with pytest.raises(ImportError, match=r"needs mmagic 1\.x \(mmagic.registry.DIFFUSION_SCHEDULERS"):
        import_module(PLUGIN)
