"""OneTrainer: what its setups draw and weigh with a policy. A stand-in, and its own model setups."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import one_trainer_standin as standin
import pytest
import torch
from conformance.separate import Made, check_law, check_loss, per_sample
from conformance.stand_ins import StandIns
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from speedit_plugins.hosts.trainers.one_trainer import adapt
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule

B, SCALE = 4000, 0.5
UNUSED = ("parse", "gguf", "torchvision")


class Model:
    """What a setup asks its model for. The network is one factor, and keeps the timesteps that it gets."""

    def __init__(self, scheduler: Any) -> None:
        self.factor = torch.nn.Parameter(torch.tensor(0.3))
        self.noise_scheduler = scheduler
        self.autocast_context = contextlib.nullcontext()
        self.vae = SimpleNamespace(config={"scaling_factor": SCALE, "shift_factor": 0.0})
        self.train_dtype = SimpleNamespace(torch_dtype=lambda: torch.float32)
        self.transformer = _Network(self.see)
        self.unet = lambda sample, timestep, *_: self.see(sample, timestep)
        self.seen = torch.empty(0)

    def see(self, sample: Tensor, timestep: Tensor) -> Any:
        self.seen = timestep.round().int()
        return SimpleNamespace(sample=self.factor * sample)

    def encode_text(self, **_: Any) -> Any:
        text = torch.zeros(1, 1, 1)
        return text if self.is_sd else (text, text)

    @property
    def is_sd(self) -> bool:
        return isinstance(self.noise_scheduler, DDIMScheduler)

    def calculate_timestep_shift(self, *_: int) -> float:
        return 3.0

    def prepare_latent_image_ids(self, *_: Any) -> None:
        return None

    def pack_latents(self, latents: Tensor) -> Tensor:
        return latents

    def unpack_latents(self, latents: Tensor, *_: int) -> Tensor:
        return latents


class _Network:
    config = SimpleNamespace(guidance_embeds=True)

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **_: Any) -> Any:
        return self.call(hidden_states, timestep * 1000)


def flow_model() -> Model:
    return Model(FlowMatchEulerDiscreteScheduler())


def sd_model() -> Model:
    return Model(DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear"))


class Host:
    """OneTrainer or its stand-in: the module that is adapted, two setups, and a config."""

    def __init__(self, module: ModuleType, flow: Any, diffusion: Any, config: Any) -> None:
        self.module, self.flow, self.diffusion, self.config = module, flow, diffusion, config

    def step(self, model: Model, step: int = 1, **options: Any) -> tuple[dict[str, Any], Tensor]:
        """A prediction of B samples, and its loss."""
        setup = self.diffusion if model.is_sd else self.flow
        generator = torch.Generator().manual_seed(step)
        latents = torch.randn(B, 4, 2, 2, generator=generator)
        batch = {"latent_image": latents, "loss_weight": torch.ones(B), "tokens": None, "tokens_mask": None}
        progress = SimpleNamespace(global_step=step)
        data = setup.predict(model, batch, self.config, progress, **options)
        return data, setup.calculate_loss(model, batch, data, self.config)


def _standin(monkeypatch: pytest.MonkeyPatch) -> Host:
    module, flow, diffusion = standin.install(monkeypatch)
    return Host(module, flow(), diffusion(), standin.config())


def _real(monkeypatch: pytest.MonkeyPatch) -> Host:
    checkout = Path(os.environ["SPEEDIT_HOSTS"]) / "Nerogar+OneTrainer"
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout.name}")
    monkeypatch.syspath_prepend(str(checkout))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    names = ["modules.modelSetup.mixin.ModelSetupNoiseMixin"]
    names += [f"modules.modelSetup.Base{name}Setup" for name in ("Flux", "StableDiffusion")]
    module, *bases = [_imported(name) for name in names]
    setups = []
    for base in bases:
        # The abstract methods build optimizers.
        made: Any = type("Setup", (getattr(base, base.__name__.split(".")[-1]),), {})
        made.__abstractmethods__ = frozenset()
        setups.append(made(torch.device("cpu"), torch.device("cpu"), False))
    config = importlib.import_module("modules.util.config.TrainConfig").TrainConfig.default_values()
    config.train_device = "cpu"
    return Host(module, *setups, config)


def _imported(name: str) -> ModuleType:
    """A module of the host. A package is replaced once it is missed, for transformers must not find it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in UNUSED:
            raise
        sys.meta_path.append(StandIns([missing]))
        return _imported(name)


@pytest.fixture(params=[_standin, pytest.param(_real, marks=pytest.mark.hosts)], ids=["stand-in", "checkout"])
def host(request: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    before = set(sys.modules)
    yield request.param(monkeypatch)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("modules", *UNUSED):
            del sys.modules[name]


@pytest.mark.parametrize("model_of", [flow_model, sd_model])
@pytest.mark.parametrize("policy", ["speed", {"type": "logit_normal", "weighting": "min_snr"}])
def test_draw_and_loss(host: Host, model_of: Callable[[], Model], policy: Any) -> None:
    model, made = model_of(), Made(policy)
    plain, _ = host.step(model)
    adapt(host.module, made)
    data, loss = host.step(model)
    assert torch.equal(model.seen.cpu(), data["timestep"])
    assert data["timestep"].dtype == torch.int32
    # The host draws uniformly: thinned by the density, this is the density.
    check_law(data["timestep"], made.policy)
    check_loss(loss, per_sample(data["predicted"], data["target"]), data["timestep"], made.policy)
    loss.backward()
    # The noise comes from the same generator, and stays what it was.
    assert torch.equal(data["target"], plain["target"])
    if model.is_sd:
        betas = NoiseSchedule.from_betas(model.noise_scheduler.betas)
        assert torch.equal(made.policy.schedule.snr, betas.snr)


def host_latents(step: int) -> Tensor:
    return SCALE * torch.randn(B, 4, 2, 2, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("model_of", [flow_model, sd_model])
def test_uniform_is_the_hosts_own_run(host: Host, model_of: Callable[[], Model]) -> None:
    model = model_of()
    host.config.timestep_shift = 2.0
    plain = [host.step(model, step) for step in (1, 2)]
    adapt(host.module, Made("uniform"))
    for (data, loss), step in zip(plain, (1, 2), strict=True):
        again, same = host.step(model, step)
        assert torch.equal(again["timestep"], data["timestep"])
        assert torch.equal(again["target"], data["target"])
        assert torch.equal(same, loss)


def test_validation_is_the_hosts_own(host: Host) -> None:
    model, made = flow_model(), Made("speed")
    with torch.no_grad():
        data, loss = host.step(model, deterministic=True)
    adapt(host.module, made)
    host.step(model)
    with torch.no_grad():
        again, same = host.step(model, deterministic=True)
    assert torch.equal(again["timestep"], data["timestep"])
    assert torch.equal(same, loss)
    assert made.policy.num_steps == 1


@pytest.mark.parametrize("model_of", [flow_model, sd_model])
def test_a_prior_prediction_has_the_draw_that_is_trained(host: Host, model_of: Callable[[], Model]) -> None:
    model, made = model_of(), Made("logit_normal")
    adapt(host.module, made)
    for step in (1, 2):
        with torch.no_grad():
            prior, _ = host.step(model, step)
        data, _ = host.step(model, step)
        assert torch.equal(prior["timestep"], data["timestep"])
        assert torch.equal(prior["target"], data["target"])
    assert made.policy.num_steps == 2


def test_thinning_keeps_shift_and_bounds(host: Host) -> None:
    model, made = flow_model(), Made({"type": "speed", "snr_boundary": 0.1})
    host.config.timestep_shift, host.config.min_noising_strength = 3.0, 0.25
    u = torch.arange(250, 1000) + torch.rand(400, 750, generator=torch.Generator().manual_seed(0))
    shifted = (1000 * 3 * u / (2 * u + 1000)).int().flatten()
    adapt(host.module, made)
    data, _ = host.step(model)
    check_law(data["timestep"], made.policy, torch.bincount(shifted, minlength=1000) / len(shifted))


@pytest.mark.parametrize("model_of", [flow_model, sd_model])
def test_auto_observes_scaled_latents(
    host: Host, model_of: Callable[[], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    observed: list[Tensor] = []
    own = TimestepPolicy.observe
    monkeypatch.setattr(
        TimestepPolicy, "observe", lambda policy, data: (observed.append(data), own(policy, data))[1]
    )
    adapt(host.module, Made("auto"))
    host.step(model_of())
    assert torch.equal(observed[-1], host_latents(1))


def test_what_is_refused(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    model = flow_model()
    adapt(host.module, Made({"type": "logit_normal", "weighting": "min_snr"}))
    with pytest.raises(ValueError, match="has a policy already"):
        adapt(host.module, Made())
    own, host.config.loss_weight_fn = host.config.loss_weight_fn, SimpleNamespace(name="SIGMA")
    with pytest.raises(ValueError, match="loss_weight_fn SIGMA weighs the loss already"):
        host.step(model)
    host.config.loss_weight_fn, host.config.max_noising_strength = own, 0.5
    with pytest.raises(ValueError, match=r"window=\[0.0, 0.5\]"):
        host.step(model)
    continuous = host.flow._get_timestep_continuous
    monkeypatch.setattr(
        type(host.flow),
        "_get_timestep_discrete",
        lambda *_, **__: continuous(False, torch.Generator(), B, host.config),
    )
    with pytest.raises(ValueError, match="Wuerstchen"):
        host.step(model)
    with pytest.raises(AttributeError, match="ModelSetupNoiseMixin"):
        adapt(ModuleType("modules.other"), Made())


def test_a_loss_without_a_draw_is_refused(host: Host) -> None:
    adapt(host.module, Made("speed"))
    zeros = torch.zeros(2, 4, 2, 2)
    data = {"predicted": zeros, "target": zeros, "loss_type": "target", "timestep": torch.zeros(2).int()}
    with pytest.raises(ValueError, match="no timesteps were drawn"):
        host.flow.calculate_loss(flow_model(), {"loss_weight": torch.ones(2)}, data, host.config)


def test_the_preview_of_the_window_is_the_hosts_own(host: Host) -> None:
    generator = torch.Generator().manual_seed(3)
    own = host.flow._get_timestep_discrete(1000, False, generator, 8, host.config)
    adapt(host.module, Made("logit_normal"))
    again = host.flow._get_timestep_discrete(1000, False, generator.manual_seed(3), 8, host.config)
    assert torch.equal(own, again)
