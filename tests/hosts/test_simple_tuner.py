"""SimpleTuner: what its models draw and weigh with a policy. A stand-in, and its own classes."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import simple_tuner_standin
import torch
from conformance.separate import Made, check_law, check_loss, per_sample
from conformance.stand_ins import StandIns
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from speedit_plugins.hosts.trainers.simple_tuner import adapt

B = 4000
UNUSED = ("torchvision", "ftfy", "bs4")


class Config(SimpleNamespace):
    """Options of a run; those that are not set are None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def config(**options: Any) -> Config:
    return Config(
        **{
            "flow_schedule_shift": 0,
            "flow_use_uniform_schedule": True,
            "disable_segmented_timestep_sampling": True,
            "timestep_bias_strategy": "none",
            "timestep_bias_portion": 0.0,
            "timestep_bias_multiplier": 1.0,
            "input_perturbation": 0,
            "scheduled_sampling_max_step_offset": 0,
            "snr_weight": 1.0,
            "weight_dtype": torch.float32,
            "flow_matching": True,
            **options,
        }
    )


class Host:
    """SimpleTuner or its stand-in: makes models by the name of their class."""

    def __init__(self, module: ModuleType, classes: dict[str, Any]) -> None:
        self.module, self.classes = module, classes

    def model(self, name: str = "ModelFoundation", *, is_flow: bool = True, **options: Any) -> Any:
        made = self.classes[name](is_flow, config(**options))
        made.noise_schedule = (
            FlowMatchEulerDiscreteScheduler()
            if is_flow
            else DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
        )
        return made

    def step(self, model: Any, seed: int = 0, num: int = B) -> tuple[dict[str, Any], Tensor, Tensor]:
        """A prepared batch of samples, a prediction for it, and its loss."""
        torch.manual_seed(seed)
        latents = torch.randn(num, 4, 2, 2)
        batch = model.prepare_batch({"latent_batch": latents, "prompt_embeds": None}, {"global_step": 1})
        factor = torch.tensor(0.3, requires_grad=True)
        prediction = factor * batch["noisy_latents"]
        loss = model.loss(batch, {"model_prediction": prediction})
        return batch, prediction, loss


def _standin() -> Iterator[Host]:
    def maker(made: type) -> Any:
        def make(is_flow: bool, options: Any) -> Any:
            model: Any = made(options)
            model.is_flow = is_flow
            return model

        return make

    spec = importlib.util.find_spec("simple_tuner_standin")
    assert spec is not None
    assert spec.loader is not None
    # A copy of its own, whose classes may be changed.
    module = importlib.util.module_from_spec(spec)
    sys.modules["simple_tuner_copy"] = module
    spec.loader.exec_module(module)
    names = ("ModelFoundation", "Boogu", "Sana", "Cosmos")
    yield Host(module, {name: maker(getattr(module, name)) for name in names})
    del sys.modules["simple_tuner_copy"]


def _real() -> Iterator[Host]:
    checkout = Path(os.environ["SPEEDIT_HOSTS"]) / "bghira+SimpleTuner"
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout.name}")
    home = "simpletuner.helpers.models"
    path, meta_path = list(sys.path), list(sys.meta_path)
    sys.path.insert(0, str(checkout))
    try:
        places = {"Boogu": "boogu_image", "Sana": "sana", "Cosmos": "cosmos"}
        # The first imports find out what is missing.
        for place in places.values():
            _imported(f"{home}.{place}.model")
        module = _imported(f"{home}.common")
        found = {name: _imported(f"{home}.{place}.model") for name, place in places.items()}
        bases = {"ModelFoundation": module.ImageModelFoundation}
        bases |= {name: _model_of(each, module.ModelFoundation) for name, each in found.items()}
        yield Host(module, {name: _maker(module, base) for name, base in bases.items()})
    finally:
        sys.path[:], sys.meta_path[:] = path, meta_path
        for name in [name for name in sys.modules if name.split(".")[0] in ("simpletuner", *UNUSED)]:
            del sys.modules[name]


def _model_of(module: ModuleType, base: type) -> type:
    own = [each for each in vars(module).values() if isinstance(each, type) and issubclass(each, base)]
    return next(each for each in own if each.__module__ == module.__name__)


def _maker(module: ModuleType, base: type) -> Any:
    def make(is_flow: bool, options: Any) -> Any:
        kinds = module.PredictionTypes
        # Without weights, and without what its own constructor reads.
        made: Any = type(base.__name__, (base,), {})
        made.__abstractmethods__ = frozenset()
        model = made.__new__(made)
        model.PREDICTION_TYPE = kinds.FLOW_MATCHING if is_flow else kinds.EPSILON
        model.config, model.accelerator = options, SimpleNamespace(device=torch.device("cpu"))
        model.diffusion_blocks_controller = None
        return model

    return make


def _imported(name: str) -> ModuleType:
    """A module of the host. A package is replaced once it is missed, for transformers must not find it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in UNUSED:
            raise
        sys.meta_path.append(StandIns([missing]))
        for half in [each for each in sys.modules if each.startswith("simpletuner")]:
            del sys.modules[half]
        return _imported(name)


@pytest.fixture(params=[_standin, pytest.param(_real, marks=pytest.mark.hosts)], ids=["stand-in", "checkout"])
def host(request: Any) -> Any:
    yield from request.param()


@pytest.mark.parametrize("policy", ["speed", {"type": "logit_normal", "weighting": "min_snr"}])
@pytest.mark.parametrize("name", ["ModelFoundation", "Boogu", "Sana"])
def test_a_flow(host: Host, name: str, policy: Any) -> None:
    made = Made(policy)
    model = host.model(name)
    adapt(host.module, made)
    batch, prediction, loss = host.step(model)
    sigma = batch["sigmas"].flatten()
    index = (sigma * 1000).long().clamp(max=999)
    # The models draw uniformly here. Sana's reads a table of 1,000 rows, whose edges are the bins'.
    if name != "Sana":
        check_law(index, made.policy)
    timesteps = 1 - sigma if name == "Boogu" else 1000 * sigma
    assert torch.allclose(batch["timesteps"], timesteps, rtol=1e-6)
    noised = (1 - batch["sigmas"]) * batch["latents"] + batch["sigmas"] * batch["noise"]
    assert torch.equal(batch["noisy_latents"], noised)
    target = model.get_prediction_target(batch)
    weights = made.all[-1]._waiting._draws[-1].drawn.weight
    wanted = (weights.double() * per_sample(prediction, target).double()).mean()
    assert torch.allclose(loss.double(), wanted, rtol=1e-6)
    loss.backward()


@pytest.mark.parametrize("policy", ["speed", {"type": "p2", "draw": "iid"}, "logit_normal"])
@pytest.mark.parametrize("in_segments", [False, True])
def test_a_model_of_noise(host: Host, policy: Any, in_segments: bool) -> None:
    made = Made(policy)
    model = host.model(is_flow=False, disable_segmented_timestep_sampling=not in_segments)
    adapt(host.module, made)
    # The host has one segment for each sample, of whole timesteps.
    batch, prediction, loss = host.step(model, num=8 if in_segments else B)
    if not in_segments:
        check_law(batch["timesteps"], made.policy)
    check_loss(loss, per_sample(prediction, batch["noise"]), batch["timesteps"], made.policy)
    assert made.policy.schedule.num_timesteps == 1000


@pytest.mark.parametrize("is_flow", [True, False])
def test_uniform_is_the_hosts_own_run(host: Host, is_flow: bool) -> None:
    options = {"flow_schedule_shift": 3.0, "disable_segmented_timestep_sampling": False}
    plain = host.step(host.model(is_flow=is_flow, **options), num=8)
    adapt(host.module, Made("uniform"))
    for model in [host.model(is_flow=is_flow, **options)] * 2:
        batch, _, loss = host.step(model, num=8)
        assert torch.equal(batch["timesteps"], plain[0]["timesteps"])
        assert torch.equal(batch["noisy_latents"], plain[0]["noisy_latents"])
        assert torch.equal(loss, plain[2])


def test_without_gradients_all_is_the_hosts_own(host: Host) -> None:
    made = Made("speed")
    with torch.no_grad():
        plain = host.step(host.model())
    adapt(host.module, made)
    host.step(host.model())
    with torch.no_grad():
        batch, _, loss = host.step(host.model())
    assert torch.equal(batch["sigmas"], plain[0]["sigmas"])
    assert torch.equal(loss, plain[2])
    assert made.policy.num_steps == 1


def test_an_evaluation_is_the_hosts_own(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made("speed")
    plain = host.step(host.model())
    validation = ModuleType("simpletuner.helpers.training.validation")
    evaluation = type("Evaluation", (), {"execute_eval": lambda self, step: step()})
    vars(validation).update(Evaluation=evaluation)
    monkeypatch.setitem(sys.modules, validation.__name__, validation)
    adapt(host.module, made)
    host.step(host.model())
    # With gradients: its `prepare_batch` runs outside of its torch.no_grad().
    batch, _, loss = evaluation().execute_eval(lambda: host.step(host.model()))
    assert torch.equal(batch["sigmas"], plain[0]["sigmas"])
    assert torch.equal(loss, plain[2])
    assert made.policy.num_steps == 1


def test_what_is_refused(host: Host) -> None:
    made = Made({"type": "logit_normal", "weighting": "min_snr"})
    with pytest.raises(AttributeError, match="ModelFoundation"):
        adapt(ModuleType("simpletuner.other"), made)
    adapt(host.module, made)
    with pytest.raises(ValueError, match="has a policy already"):
        adapt(host.module, made)
    with pytest.raises(ValueError, match="snr_gamma 5 weighs the loss already"):
        host.step(host.model(is_flow=False, snr_gamma=5))
    with pytest.raises(ValueError, match="weighting_scheme sigma_sqrt weighs the loss already"):
        host.step(host.model("Sana", weighting_scheme="sigma_sqrt"))
    with pytest.raises(ValueError, match="mixflow_enabled draws in a way"):
        host.step(host.model(mixflow_enabled=True))


def test_a_loss_that_is_a_scalar_at_once_gets_the_draw_alone(host: Host) -> None:
    made = Made({"type": "logit_normal", "weighting": "min_snr"})
    adapt(host.module, made)
    model = host.model("Cosmos")
    model.sigma_data = 1.0
    with pytest.raises(
        ValueError, match="Cosmos.*SimpleTuner (makes a loss of its own, a scalar|draws its t in another way)"
    ):
        host.step(model)


def test_a_statement_that_is_missing_is_named() -> None:
    def loss(self: Any, prepared_batch: Any, model_output: Any) -> float:
        return 0.0

    loss.__qualname__ = "ModelFoundation.loss"
    base = type("ModelFoundation", (), {**vars(simple_tuner_standin.ModelFoundation), "loss": loss})
    with pytest.raises(ValueError, match=r"has the statement 'loss = loss.mean\(\)' 0 times, wanted once"):
        adapt(SimpleNamespace(ModelFoundation=base), Made())  # type: ignore[arg-type]  # only this is read
