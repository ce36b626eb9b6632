"""musubi-tuner: a method of the trainer draws the times of a batch and noises it at them.

Each test runs on a stand-in with the host's signatures, and on the checkout if there is one.
"""

import importlib
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch
from conformance.stand_ins import StandIns
from test_noisy_batch import FLAGS, NUM_SIGMAS, worst_tenth
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers import noisy_trainer

CHECKOUT = "kohya-ss+musubi-tuner"
# What the checkout imports and these tests do not use.
ABSENT = ("toml", "voluptuous", "easydict", "ftfy", "torchvision", "sentencepiece")
SAMPLINGS = ("sigma", "uniform", "shift")
SIZE, NUM_STEPS = 16, 120


@pytest.fixture(scope="module", params=["stand-in", pytest.param("checkout", marks=pytest.mark.hosts)])
def imported(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    if request.param == "stand-in":
        yield importlib.import_module("library_standin.trainer_base")
        return
    folder = Path(os.environ["SPEEDIT_HOSTS"]) / CHECKOUT / "src"
    if not folder.is_dir():
        pytest.skip(f"no checkout {CHECKOUT}")
    # transformers looks once at what is installed, so these come before the stand-ins.
    from diffusers import StableDiffusionPipeline  # noqa: F401 - for the import alone
    from transformers import CLIPTextModel, T5EncoderModel  # noqa: F401 - for the import alone

    before = set(sys.modules)
    paths = {"path": [str(folder), *sys.path], "meta_path": [*sys.meta_path, StandIns(ABSENT)]}
    with mock.patch.multiple(sys, **paths):
        yield importlib.import_module("musubi_tuner.training.trainer_base")
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("musubi_tuner", *ABSENT):
            del sys.modules[name]


@pytest.fixture
def module(imported: ModuleType) -> Iterator[ModuleType]:
    own = imported.NetworkTrainer.get_noisy_model_input_and_timesteps
    error = functional.mse_loss
    yield imported
    imported.NetworkTrainer.get_noisy_model_input_and_timesteps = own
    vars(functional)["mse_loss"] = error


def adapted(module: ModuleType, policy: Any) -> list[SeparateDraws]:
    made: list[SeparateDraws] = []

    def draws_of(**options: Any) -> SeparateDraws:
        made.append(SeparateDraws(policy, stream=DrawStream(torch.Generator().manual_seed(7)), **options))
        return made[0]

    noisy_trainer.adapt(module, draws_of)
    return made


def flags(**changes: Any) -> Namespace:
    own = {"preserve_distribution_shape": False, "show_timesteps": None}
    return Namespace(**{**FLAGS, **own, "timestep_sampling": "shift", **changes})


def trainer_of(module: ModuleType) -> Any:
    """A trainer of the host with a model of one number, which notes what it saw."""

    class Trainer(module.NetworkTrainer):  # type: ignore[misc,name-defined]  # a class of the host
        num_timestep_buckets = None

        def __init__(self) -> None:
            self.scale = nn.Parameter(torch.tensor(0.5))
            self.seen: list[tuple[Tensor, ...]] = []

        def call_dit(self, *given: Any, **others: Any) -> Any:
            latents, _, noise, noisy, timesteps, _ = given[3:]
            answer = SimpleNamespace(pred=self.scale * noisy, target=noise - latents)
            error = (answer.pred - answer.target).detach().double().square().flatten(1).mean(1)
            self.seen.append((timesteps.clone(), noisy.clone(), error))
            return answer

    return Trainer()


def scheduler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


def trained(module: ModuleType, args: Namespace, num_steps: int) -> tuple[Any, list[float]]:
    """A small training of the host's own `process_batch`, and the loss of each step."""
    trainer, losses = trainer_of(module), []
    optimizer = torch.optim.SGD([trainer.scale], lr=0.01)
    torch.manual_seed(1)
    for step in range(num_steps):
        latents, noise = torch.randn(2, SIZE, 2, 1, 2, 2)
        kinds = (torch.float32, torch.float32)
        given = (args, SimpleNamespace(device="cpu"), None, None, {"timesteps": None}, latents, noise)
        loss, _ = trainer.process_batch(*given, scheduler(), *kinds, None, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return trainer, losses


def time_of(timesteps: Tensor, sampling: str) -> Tensor:
    """musubi-tuner counts from 1, but for the rows of its scheduler."""
    return (timesteps - int(sampling != "sigma")) / 1000


@pytest.mark.filterwarnings("ignore:'speed' was made for a model of noise")
class TestTraining:
    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_the_model_sees_the_law_and_the_loss_is_weighed(self, module: ModuleType, sampling: str) -> None:
        policy = {"density": "logit_normal", "weighting": {"type": "p2", "gamma": 0.5}}
        made = adapted(module, policy)
        trainer, losses = trained(module, flags(timestep_sampling=sampling), NUM_STEPS)
        time = torch.cat([time_of(t, sampling) for t, *_ in trainer.seen])
        assert len(time) == SIZE * NUM_STEPS
        if sampling != "sigma":
            assert worst_tenth(time, made[0].policy.density) < NUM_SIGMAS
        assert made[0].policy.num_steps == NUM_STEPS
        for (t, _, error), loss in zip(trainer.seen, losses, strict=True):
            index = (time_of(t, sampling).double() * 1000).floor().long().clamp(max=999)
            # A t in float32, from 1 on, is told to 6e-8 of it: it may be in the next bin of 1,000.
            direct = (made[0].policy.weight[index] * error).mean()
            assert abs(loss / float(direct) - 1) < 2e-3

    @pytest.mark.parametrize("sampling", SAMPLINGS)
    def test_uniform_is_the_host(self, module: ModuleType, sampling: str) -> None:
        """Losses and batches of a whole training are the host's to the bit, at the same t."""
        args = flags(timestep_sampling=sampling, min_timestep=100, max_timestep=900)
        host, wanted = trained(module, args, 10)
        adapted(module, "uniform")
        with mock.patch.object(SeparateDraws, "times", _hosts_times):
            ours, found = trained(module, args, 10)
        assert found == wanted
        for mine, theirs in zip(ours.seen, host.seen, strict=True):
            assert all(map(torch.equal, mine, theirs))

    def test_a_law_is_cut_to_the_hosts_window(self, module: ModuleType) -> None:
        made = adapted(module, "logit_normal")
        trainer, _ = trained(module, flags(min_timestep=200, max_timestep=700), 60)
        time = torch.cat([time_of(t, "shift") for t, *_ in trainer.seen])
        assert 0.2 <= float(time.min()) < float(time.max()) < 0.7001
        assert worst_tenth(time, made[0].policy.density) < NUM_SIGMAS

    def test_a_learning_policy_learns_each_samples_loss(self, module: ModuleType) -> None:
        adapted(module, "loss_second_moment")
        learned: list[Tensor] = []
        target = "speedit_plugins.policies.policy.TimestepPolicy.update"
        with mock.patch(target, lambda _, index, loss: learned.append(loss)):
            trainer, _ = trained(module, flags(), 2)
        for (*_, error), loss in zip(trainer.seen, learned, strict=True):
            assert torch.allclose(loss.double(), error, rtol=1e-6)

    def test_one_loss_after_a_draw_is_weighed(self, module: ModuleType) -> None:
        made = adapted(module, "speed")
        own, trainer = functional.mse_loss, trainer_of(module)
        latents, noise = torch.randn(2, SIZE, 2, 1, 2, 2)
        given = (flags(), noise, latents, None, scheduler(), "cpu", torch.float32)
        with torch.no_grad():
            trainer.get_noisy_model_input_and_timesteps(*given)
        assert functional.mse_loss is own
        trainer.get_noisy_model_input_and_timesteps(*given)
        ones, zeros = torch.ones(SIZE, 4, requires_grad=True), torch.zeros(SIZE, 4)
        with torch.no_grad():
            assert float(functional.mse_loss(ones, zeros)) == 1
        assert float(functional.mse_loss(ones, zeros).detach()) < 0.9
        assert functional.mse_loss is own
        assert made[0].policy.num_steps == 1


class TestRefusals:
    def test_a_module_without_the_method(self) -> None:
        with pytest.raises(ValueError, match="has no NetworkTrainer and no compute_density_for_timestep"):
            noisy_trainer.adapt(ModuleType("empty"), partial(SeparateDraws, "speed"))

    def test_a_second_policy(self, module: ModuleType) -> None:
        adapted(module, "uniform")
        with pytest.raises(ValueError, match="has a policy already"):
            adapted(module, "uniform")

    @pytest.mark.filterwarnings("ignore:'speed' was made for a model of noise")
    def test_second_weights(self, module: ModuleType) -> None:
        adapted(module, "speed")
        with pytest.raises(ValueError, match="--weighting_scheme sigma_sqrt weighs the host's loss already"):
            trained(module, flags(weighting_scheme="sigma_sqrt"), 1)

    def test_two_models_by_time(self, module: ModuleType) -> None:
        adapted(module, "uniform")
        trainer = trainer_of(module)
        trainer.high_low_training = True
        latents, noise = torch.randn(2, SIZE, 2, 1, 2, 2)
        with pytest.raises(ValueError, match="fits one of its two models.*--dit_high_noise"):
            trainer.get_noisy_model_input_and_timesteps(
                flags(), noise, latents, None, scheduler(), "cpu", torch.float32
            )


def _hosts_times(draws: SeparateDraws, hosts_draw: Any, *others: Any) -> Tensor:
    """`SeparateDraws.times` of a policy that keeps the host's first draw."""
    drawn = hosts_draw()
    time = drawn.float()
    draws._waiting.add(drawn, draws.at((time * 1000).long().clamp(max=999), time))
    draws._is_used = True
    result: Tensor = drawn
    return result
