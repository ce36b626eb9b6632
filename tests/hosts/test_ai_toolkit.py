"""ai-toolkit: what its trainer draws and weighs with a policy. A stand-in, and its own classes."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.separate import Made, check_law, check_loss, per_sample
from conformance.stand_ins import StandIns
from diffusers import DDPMScheduler
from torch import Tensor

from speedit_plugins.hosts.trainers.ai_toolkit import adapt

B = 4000
HOME = "extensions_built_in.sd_trainer.SDTrainer"
UNUSED = ("torchaudio", "torchao", "torchvision", "albumentations", "optimum", "lpips", "lycoris")


class Anything(SimpleNamespace):
    """An object of the host; what is not given is None."""

    def __getattr__(self, name: str) -> Any:
        # The host asks by hasattr for some of the methods of a model.
        if name.startswith(("__", "get_")):
            raise AttributeError(name)
        return None


class Batch(Anything):
    """A batch of the host's data loader, without captions and regularisation."""

    def get_caption_list(self, *_: Any, **__: Any) -> list[str]:
        return [""] * len(self.file_items)

    def get_is_reg_list(self) -> list[bool]:
        return [False] * len(self.file_items)


class Host:
    """The module that is adapted, and a trainer by the kind of its model."""

    def __init__(self, module: ModuleType, scheduler: Any, make: Any) -> None:
        self.module, self.scheduler, self.make = module, scheduler, make

    def trainer(self, *, is_flow: bool = True, **options: Any) -> Any:
        # Its table of rows is that of the training.
        scheduler = self.scheduler() if is_flow else DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
        sd = Anything(noise_scheduler=scheduler, is_flow_matching=is_flow, prediction_type="epsilon", arch="")
        sd.scale_loss = lambda loss: loss
        sd.unet = None

        def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
            if not is_flow:
                noised: Tensor = scheduler.add_noise(latents, noise, timesteps.long())
                return noised
            sigma = (timesteps / 1000).view(-1, 1, 1, 1)
            return (1 - sigma) * latents + sigma * noise

        sd.add_noise = add_noise
        del sd.unet
        return self.make(sd, {"noise_scheduler": "flowmatch" if is_flow else "ddpm", **options})

    def step(self, trainer: Any, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Timesteps, the plain loss (B,), the trainer's loss and the noisy latents of a step."""
        torch.manual_seed(seed)
        latents = torch.randn(B, 4, 2, 2)
        batch = Batch(latents=latents, file_items=[Anything()] * B, loss_multiplier_list=[1.0] * B)
        noisy, noise, timesteps, *_ = trainer.process_general_training_batch(batch)
        factor = torch.tensor(0.3, requires_grad=True)
        prediction = factor * noisy
        loss = trainer.calculate_loss(prediction, noise, noisy, timesteps, batch)
        target = noise - latents if trainer.sd.is_flow_matching else noise
        return timesteps, per_sample(prediction, target), loss, noisy


def _standin() -> Iterator[Host]:
    spec = importlib.util.find_spec("ai_toolkit_standin")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def make(sd: Any, options: dict[str, Any]) -> Any:
        return module.SDTrainer(sd, SimpleNamespace(**{**vars(module.options()), **options}))

    yield Host(module, module.Scheduler, make)


def _real() -> Iterator[Host]:
    checkout = Path(os.environ["SPEEDIT_HOSTS"]) / "ostris+ai-toolkit"
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout.name}")
    path, meta_path = list(sys.path), list(sys.meta_path)
    sys.path.insert(0, str(checkout))
    try:
        _imported(HOME)
        module = _imported(HOME)
        configs = importlib.import_module("toolkit.config_modules")
        sampler = importlib.import_module("toolkit.samplers.custom_flowmatch_sampler")

        def make(sd: Any, options: dict[str, Any]) -> Any:
            # Without its constructor, which loads models.
            trainer = module.SDTrainer.__new__(module.SDTrainer)
            vars(trainer).update(
                vars(Anything(sd=sd, adapter=None, dfe=None, trigger_word=None, embedding=None))
            )
            trainer.train_config = configs.TrainConfig(
                **{"timestep_type": "linear", "dtype": "float32", **options}
            )
            trainer.model_config = Anything()
            trainer.device_torch = torch.device("cpu")
            trainer.timer = module.Timer("test") if hasattr(module, "Timer") else _timer
            trainer.additional_logs = {}
            trainer.get_noise = lambda latents, *_, **__: torch.randn_like(latents)
            return trainer

        yield Host(module, sampler.CustomFlowMatchEulerDiscreteScheduler, make)
    finally:
        sys.path[:], sys.meta_path[:] = path, meta_path
        _forget()


def _timer(_: str) -> Any:
    return torch.no_grad()


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in (*OWN, *UNUSED)]:
        del sys.modules[name]


OWN = ("extensions_built_in", "toolkit", "jobs")


def _imported(name: str) -> ModuleType:
    """A module of the host. A package is replaced once it is missed, for transformers must not find it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in UNUSED:
            raise
        sys.meta_path.append(StandIns([missing]))
        for half in [each for each in sys.modules if each.split(".")[0] in OWN]:
            del sys.modules[half]
        return _imported(name)


@pytest.fixture(params=[_standin, pytest.param(_real, marks=pytest.mark.hosts)], ids=["stand-in", "checkout"])
def host(request: Any) -> Any:
    yield from request.param()


@pytest.mark.parametrize("policy", ["speed", {"type": "logit_normal", "weighting": "min_snr"}])
@pytest.mark.parametrize("is_flow", [True, False])
def test_draw_and_loss(host: Host, policy: Any, is_flow: bool) -> None:
    made = Made(policy)
    adapt(host.module, made)
    trainer = host.trainer(is_flow=is_flow)
    timesteps, plain, loss, _ = host.step(trainer)
    # Row i of a flow is noised at 1 - i / 1000: the upper edge of its bin.
    index = timesteps.round().long() - int(is_flow)
    # The host leaves out a row or two at the ends.
    check_law(index, made.policy)
    if is_flow:
        weight = made.all[-1]._waiting._draws[-1].drawn.weight
        assert torch.allclose(loss.double(), (weight.double() * plain.double()).mean(), rtol=1e-6)
    else:
        check_loss(loss, plain, index, made.policy)
    assert made.policy.num_steps == 1
    loss.backward()


@pytest.mark.parametrize("is_flow", [True, False])
def test_uniform_is_the_hosts_own_run(host: Host, is_flow: bool) -> None:
    plain = [host.step(host.trainer(is_flow=is_flow), seed) for seed in (1, 2)]
    adapt(host.module, Made("uniform"))
    for seed, before in zip((1, 2), plain, strict=True):
        after = host.step(host.trainer(is_flow=is_flow), seed)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_bounds_are_kept_or_refused(host: Host) -> None:
    made = Made("speed")
    adapt(host.module, lambda **options: made(**options))
    trainer = host.trainer(min_denoising_steps=200, max_denoising_steps=400)
    timesteps, *_ = host.step(trainer)
    assert 599 <= float(timesteps.min()) <= float(timesteps.max()) <= 801
    made.policy_config = "logit_normal"
    with pytest.raises(
        ValueError, match=r"min_denoising_steps and max_denoising_steps: give it window=\[0.6, 0.8\]"
    ):
        host.step(host.trainer(min_denoising_steps=200, max_denoising_steps=400))
    made.policy_config = {"type": "logit_normal", "window": [0.6, 0.8]}
    timesteps, *_ = host.step(host.trainer(min_denoising_steps=200, max_denoising_steps=400))
    assert 599 <= float(timesteps.min()) <= float(timesteps.max()) <= 801


def test_what_is_refused(host: Host) -> None:
    made = Made({"type": "logit_normal", "weighting": "min_snr"})
    with pytest.raises(AttributeError, match="SDTrainer"):
        adapt(ModuleType("other"), made)
    adapt(host.module, made)
    with pytest.raises(ValueError, match="has a policy already"):
        adapt(host.module, made)
    for options, told in (
        ({"timestep_type": "weighted"}, "timestep_type weighted weighs the loss already"),
        ({"linear_timesteps": True}, "linear_timesteps weighs the loss already"),
        ({"snr_gamma": 5.0, "is_flow": False}, "snr_gamma weighs the loss already"),
    ):
        # What the trainer does with its own weights beside a policy is not reached.
        with pytest.raises(ValueError, match=told):
            host.step(host.trainer(**options))
    trainer = host.trainer()
    trainer.train_config.timestep_type = "next_sample"
    with pytest.raises(ValueError, match="next_sample changes t after the draw"):
        host.step(trainer)
    trainer.train_config.timestep_type = "four_step"
    with pytest.raises(ValueError, match="four_step trains at few rows"):
        host.step(trainer)
