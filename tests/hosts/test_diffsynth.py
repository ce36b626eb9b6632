"""DiffSynth-Studio: what its losses draw and weigh with a policy. A stand-in, and its own functions."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from conformance.separate import Made, check_law
from conformance.stand_ins import StandIns
from torch import Tensor

from speedit_plugins.hosts.trainers.diffsynth import adapt
from speedit_plugins.policies.schedule import NoiseSchedule

STEPS = 600
UNUSED = ("torchvision", "imageio", "pandas", "modelscope")


class Host:
    """The module of the losses, and pipelines for them. The network is one factor."""

    def __init__(self, module: ModuleType, flow: Any, diffusion: Any) -> None:
        self.module, self.flow, self.diffusion = module, flow, diffusion
        self.factor = torch.tensor(0.3, requires_grad=True)
        # Timesteps, noisy latents and errors, one for each step.
        self.seen: list[Tensor] = []
        self.noisy: list[Tensor] = []

    def pipe(self, scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
        return SimpleNamespace(
            scheduler=scheduler,
            torch_dtype=dtype,
            device=torch.device("cpu"),
            in_iteration_models=(),
            model_fn=self._predict,
        )

    def _predict(self, *, timestep: Tensor, **inputs: Any) -> Any:
        self.seen.append(timestep)
        if "video_latents" in inputs:
            return self.factor * inputs["video_latents"], self.factor * inputs["audio_latents"]
        self.noisy.append(inputs["latents"])
        return self.factor * inputs["latents"]

    def step(self, pipe: Any, seed: int = 0, **inputs: Any) -> Tensor:
        """The loss of one sample of zeros: what is noised is sigma * noise."""
        torch.manual_seed(seed)
        loss: Tensor = self.module.FlowMatchSFTLoss(pipe, input_latents=torch.zeros(1, 4, 2, 2), **inputs)
        return loss


def _standin() -> Iterator[Host]:
    spec = importlib.util.find_spec("diffsynth_standin")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield Host(module, module.FlowMatchScheduler, None)


def _real() -> Iterator[Host]:
    checkout = Path(os.environ["SPEEDIT_HOSTS"]) / "modelscope+DiffSynth-Studio"
    if not checkout.is_dir():
        pytest.skip(f"no checkout {checkout.name}")
    path, meta_path = list(sys.path), list(sys.meta_path)
    sys.path.insert(0, str(checkout))
    try:
        _imported("diffsynth.diffusion.loss")
        module = _imported("diffsynth.diffusion.loss")
        flow = importlib.import_module("diffsynth.diffusion.flow_match").FlowMatchScheduler
        diffusion = importlib.import_module("diffsynth.diffusion.ddim_scheduler").DDIMScheduler
        yield Host(module, lambda: _set(flow("FLUX.1")), lambda: _set(diffusion()))
    finally:
        sys.path[:], sys.meta_path[:] = path, meta_path
        for name in [name for name in sys.modules if name.split(".")[0] in ("diffsynth", *UNUSED)]:
            del sys.modules[name]


def _set(scheduler: Any) -> Any:
    scheduler.set_timesteps(1000, training=True)
    return scheduler


def _imported(name: str) -> ModuleType:
    """A module of the host. A package is replaced once it is missed, for transformers must not find it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = str(error.name).split(".")[0]
        if missing not in UNUSED:
            raise
        sys.meta_path.append(StandIns([missing]))
        for half in [each for each in sys.modules if each.startswith("diffsynth")]:
            del sys.modules[half]
        return _imported(name)


@pytest.fixture(params=[_standin, pytest.param(_real, marks=pytest.mark.hosts)], ids=["stand-in", "checkout"])
def host(request: Any) -> Any:
    yield from request.param()


def scalar_mse(host: Host, noisy: Tensor, seed: int) -> Tensor:
    """The plain loss of a step: noise is what the scheduler noised with, and the data are 0."""
    torch.manual_seed(seed)
    torch.randint(0, 1000, (1,))
    noise = torch.randn(1, 4, 2, 2)
    return ((host.factor * noisy - noise) ** 2).mean().detach()


@pytest.mark.parametrize(
    "policy", ["speed", "logit_normal", {"type": "logit_normal", "weighting": "min_snr"}]
)
def test_a_flow(host: Host, policy: Any) -> None:
    made, scheduler = Made(policy), host.flow()
    adapt(host.module, made)
    pipe = host.pipe(scheduler)
    losses = [host.step(pipe, seed) for seed in range(STEPS)]
    time = torch.cat(host.seen) / 1000
    # The host draws rows uniformly. The rows' times have the density of its shift.
    rows = torch.bincount((scheduler.sigmas * 1000).long().clamp(max=999), minlength=1000) / 1000
    check_law((time * 1000).long().clamp(max=999), made.policy, rows if made.policy.is_relative else None)
    weights = [each.drawn.weight for each in made.all[-1]._waiting._draws]
    for seed in range(STEPS - 64, STEPS):
        weight = weights[seed - STEPS]
        if policy == "logit_normal":
            # A policy without weights leaves the host's.
            weight = scheduler.training_weight(host.seen[seed])
        wanted = weight * scalar_mse(host, host.noisy[seed], seed)
        assert torch.allclose(losses[seed], wanted, rtol=1e-6)
    losses[-1].backward()


def test_uniform_is_the_hosts_own_run(host: Host) -> None:
    pipe = host.pipe(host.flow())
    plain = [host.step(pipe, seed) for seed in range(20)]
    adapt(host.module, Made("uniform"))
    assert [host.step(pipe, seed) for seed in range(20)] == plain
    assert torch.equal(torch.cat(host.seen[:20]), torch.cat(host.seen[20:]))


def test_without_gradients_all_is_the_hosts_own(host: Host) -> None:
    made, pipe = Made("speed"), host.pipe(host.flow())
    with torch.no_grad():
        plain = host.step(pipe)
    adapt(host.module, made)
    host.step(pipe)
    with torch.no_grad():
        assert torch.equal(host.step(pipe), plain)
    assert made.policy.num_steps == 1


def test_the_rows_of_bfloat16_are_those_that_are_noised(host: Host) -> None:
    made, scheduler = Made("speed"), host.flow()
    adapt(host.module, made)
    pipe = host.pipe(scheduler, torch.bfloat16)
    for seed in range(30):
        host.step(pipe, seed)
        torch.manual_seed(seed)
        torch.randint(0, 1000, (1,))
        sigma = (host.noisy[-1] / torch.randn(1, 4, 2, 2)).mean()
        time = made.all[-1]._waiting._draws[-1].drawn.time
        assert torch.allclose(time, sigma, atol=1e-5)


def test_experts_keep_their_range(host: Host) -> None:
    pipe, bounds = host.pipe(host.flow()), {"min_timestep_boundary": 0.0, "max_timestep_boundary": 0.358}
    made = Made("logit_normal")
    adapt(host.module, lambda **options: made(**options))
    with pytest.raises(ValueError, match=r"'logit_normal' draws by a law of its own.*window=\[0.84, 1.0\]"):
        host.step(pipe, **bounds)
    made.policy_config = {"type": "logit_normal", "window": [0.85, 1.0]}
    other = host.pipe(host.flow())
    for seed in range(50):
        host.step(other, seed, **bounds)
    assert float(torch.cat(host.seen).min()) >= 840
    made.policy_config = "speed"
    other = host.pipe(host.flow())
    for seed in range(50):
        host.step(other, seed, **bounds)
    assert float(torch.cat(host.seen).min()) >= float(other.scheduler.timesteps[357])


def test_sound_is_weighed_with_its_video(host: Host) -> None:
    made, scheduler = Made("speed"), host.flow()
    adapt(host.module, made)
    latents = {name: torch.zeros(1, 4, 2, 2) for name in ("input_latents", "audio_input_latents")}
    torch.manual_seed(0)
    loss = host.module.FlowMatchSFTAudioVideoLoss(host.pipe(scheduler), **latents)
    sigma = host.seen[-1] / 1000
    torch.manual_seed(0)
    torch.randint(0, 1000, (1,))
    plain = sum((((0.3 * sigma - 1) * torch.randn(1, 4, 2, 2)) ** 2).mean() for _ in range(2))
    assert torch.allclose(loss, made.all[-1]._waiting._draws[-1].drawn.weight * plain, rtol=1e-5)


def test_a_model_of_noise(host: Host) -> None:
    if host.diffusion is None:
        pytest.skip("the stand-in has no DDIMScheduler")
    made, scheduler = Made("speed"), host.diffusion()
    adapt(host.module, made)
    pipe = host.pipe(scheduler)
    losses = [host.step(pipe, seed) for seed in range(STEPS)]
    index = torch.cat(host.seen).long()
    check_law(index, made.policy)
    table = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)
    assert torch.equal(made.policy.schedule.snr, table.snr)
    for seed in range(0, STEPS, 100):
        weight = made.policy.weight[index[seed]]
        assert torch.allclose(
            losses[seed].double(), weight * scalar_mse(host, host.noisy[seed], seed), rtol=1e-6
        )


def test_what_is_refused(host: Host) -> None:
    with pytest.raises(ValueError, match="has none of FlowMatchSFTLoss"):
        adapt(ModuleType("diffsynth.other"), Made())
    adapt(host.module, Made())
    with pytest.raises(ValueError, match="has a policy already"):
        adapt(host.module, Made())
