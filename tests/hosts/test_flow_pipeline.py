"""NeMo Automodel's FlowMatchingPipeline: a draw and a loss in two methods of one object."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import split_step
from conformance.host_imports import checkout, imported
from conformance.split_step import WEIGHING, Made, Recorded, SplitHost
from torch import Tensor

from speedit_plugins.hosts.trainers.flow_pipeline import adapt

CPU = torch.device("cpu")


def latents() -> Tensor:
    """Latents (4, C, F, H, W) of a batch."""
    return torch.randn(4, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


@contextmanager
def stand_in() -> Iterator[ModuleType]:
    yield importlib.reload(importlib.import_module("flow_pipeline_standin"))


@contextmanager
def nemo() -> Iterator[ModuleType]:
    with imported(
        "nemo_automodel.components.flow_matching.pipeline", [checkout("NVIDIA-NeMo+Automodel")]
    ) as module:
        yield module


class Adapter:
    """NeMo's adapter of a model: the noised latents and timesteps go to it as they are."""

    def prepare_inputs(self, context: Any) -> Any:
        return context

    def forward(self, model: Any, context: Any) -> Tensor:
        made: Tensor = model(context.noisy_latents, context.timesteps)
        return made

    def compute_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction.float() - target.float()) ** 2

    def auxiliary_losses(self, inputs: Any) -> dict[str, Tensor]:
        return {}


def pipeline(module: ModuleType, **options: Any) -> Any:
    """The host's object, whose own draws have a shift of 3."""
    return module.FlowMatchingPipeline(Adapter(), flow_shift=3.0, **options)


def host_of(made: Callable[[], Any]) -> Callable[[], Any]:
    @contextmanager
    def fresh() -> Iterator[SplitHost]:
        with made() as module:

            def step() -> Made:
                torch.manual_seed(3)
                scale, seen = torch.tensor(0.5, requires_grad=True), list[Tensor]()
                noises, own = list[Tensor](), torch.randn_like

                def model(x: Tensor, t: Tensor) -> Tensor:
                    seen.extend((t / 1000, scale * x))
                    return seen[1]

                def randn_like(*args: Any, **kwargs: Any) -> Tensor:
                    noises.append(own(*args, **kwargs))
                    return noises[-1]

                host = pipeline(module, use_loss_weighting=False)
                with mock.patch.object(torch, "randn_like", randn_like):
                    _, loss, *_ = host.step(
                        model, {"video_latents": latents()}, CPU, torch.float32, collect_metrics=False
                    )
                errors = ((seen[1] - (noises[0] - latents())) ** 2).flatten(1).mean(1)
                return Made(seen[0], loss.detach(), errors.detach())

            @contextmanager
            def forced(t: Tensor) -> Iterator[None]:
                # The u of which the host's shift makes t.
                u = 1 / (1 + 3 / t - 3)
                names = {"rand": lambda *_, **__: u.clone(), "normal": lambda *_, **__: u.logit()}
                with (
                    mock.patch.multiple(torch, **names),
                    mock.patch.object(torch.Tensor, "item", return_value=0.5),
                ):
                    yield

            yield SplitHost(partial(adapt, module), step, forced, observed=latents)

    return fresh


def test_the_stand_in() -> None:
    split_step.check(host_of(stand_in))


@pytest.mark.hosts
def test_nemo_automodel() -> None:
    split_step.check(host_of(nemo))


def weights_of_both_are_refused(module: ModuleType) -> None:
    adapt(module, Recorded(WEIGHING))
    host = pipeline(module)
    with pytest.raises(
        ValueError, match="this pipeline weighs its loss .linear.*set use_loss_weighting to false"
    ):
        host.step(lambda x, _: x, {"video_latents": latents()}, CPU, torch.float32)
    with pytest.raises(ValueError, match=r"step has a policy already"):
        adapt(module, Recorded(WEIGHING))


def test_weights_of_both() -> None:
    with stand_in() as module:
        weights_of_both_are_refused(module)
    with pytest.raises(ValueError, match=r"has no FlowMatchingPipeline \(NeMo Automodel\)"):
        adapt(ModuleType("other"), Recorded("uniform"))


@pytest.mark.hosts
def test_weights_of_both_in_nemo() -> None:
    with nemo() as module:
        weights_of_both_are_refused(module)


def test_a_policy_that_only_draws_keeps_the_hosts_weights() -> None:
    with stand_in() as module:
        adapt(module, Recorded("logit_normal"))
        seen: list[Tensor] = []

        def model(x: Tensor, t: Tensor) -> Tensor:
            seen.append(t / 1000)
            return x * torch.tensor(0.5, requires_grad=True)

        weighted, mean, *_ = pipeline(module).step(model, {"video_latents": latents()})
        assert torch.equal(weighted.mean(), mean)
        ratio = weighted / ((1 + 3 * seen[0]).view(-1, 1, 1, 1, 1))
        assert bool((ratio > 0).any())
        # Outside of a step, as in a report of the host, the draw is its own.
        torch.manual_seed(0)
        own = pipeline(module).sample_timesteps(4)[0]
        torch.manual_seed(0)
        assert torch.equal(own, 3 / (3 + 1 / torch.rand(4) - 1))
