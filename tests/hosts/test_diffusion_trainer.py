"""DDT: diffusion trainers whose training step is edited."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import split_step
from conformance.host_imports import checkout, imported
from conformance.split_step import Made, Recorded, SplitHost
from torch import Tensor, nn

from speedit_plugins.hosts.trainers.diffusion_trainer import MODULES, adapt

SHAPE = (4, 3, 4, 4)


class Net(nn.Module):
    """Returns its input times a number, and keeps what it saw and returned; the first block is empty."""

    def __init__(self, answers_two: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.blocks = nn.ModuleList([nn.Identity()])
        self._answers_two = answers_two

    def forward(self, x: Tensor, t: Tensor, *_: Any) -> Any:
        self.time = 1 - t
        self.output = self.blocks[0](x * self.scale)
        return (self.output, None) if self._answers_two else self.output


def data() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def split_host(module: ModuleType, trainer: Any, *others: Any, shift: float = 1.0) -> SplitHost:
    """A host whose training step takes a model, `others` and the data, without a policy."""
    answers_two = "stateful" in module.__name__

    def step() -> Made:
        torch.manual_seed(3)
        net, noises, own = Net(answers_two), list[Tensor](), torch.randn_like

        def randn_like(*args: Any, **kwargs: Any) -> Tensor:
            noises.append(own(*args, **kwargs))
            return noises[-1]

        label = [None] if others else []
        with mock.patch.object(torch, "randn_like", randn_like):
            terms = trainer._impl_trainstep(net, *others, data(), *label)
        errors = ((net.output - (data() - noises[0])) ** 2).flatten(1).mean(1)
        return Made(net.time.detach(), terms["fm_loss" if "fm_loss" in terms else "loss"], errors.detach())

    def forced(t: Tensor) -> Any:
        base = shift * (1 - t) / (t + shift * (1 - t))
        return mock.patch.object(torch, "rand", side_effect=lambda *_, **__: base.clone())

    return SplitHost(partial(adapt, module), step, forced, observed=data)


@contextmanager
def fresh_stand_in(shift: float) -> Iterator[SplitHost]:
    module = importlib.reload(importlib.import_module("diffusion_trainer_standin"))
    yield split_host(module, module.REPATrainer(shift), shift=shift)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_trainer_that_shifts_its_draw(shift: float) -> None:
    split_step.check(partial(fresh_stand_in, shift))


def test_what_is_refused() -> None:
    module = importlib.reload(importlib.import_module("diffusion_trainer_standin"))
    adapt(module, Recorded(split_step.WEIGHING))
    with pytest.raises(ValueError, match="_impl_trainstep has a policy already"):
        adapt(module, Recorded("uniform"))
    trainer = module.REPATrainer()
    trainer.loss_weight_fn = lambda alpha, sigma: alpha / sigma
    with pytest.raises(ValueError, match="loss_weight_fn weighs the loss already"):
        trainer._impl_trainstep(Net(False), data())
    module = importlib.reload(module)
    adapt(module, Recorded("logit_normal"))
    trainer = module.REPATrainer()
    trainer.scheduler.alpha = lambda t: torch.cos(t * torch.pi / 2)
    with pytest.raises(ValueError, match=r"needs a straight path.* LinearScheduler has 0\.92"):
        trainer._impl_trainstep(Net(False), data())
    with pytest.raises(ValueError, match="has no trainer of DDT"):
        adapt(ModuleType("other"), Recorded("uniform"))


@contextmanager
def fresh_ddt(name: str) -> Iterator[SplitHost]:
    replaced = ("timm", "torchvision")
    with imported(f"src.diffusion.{name}", [checkout("MCG-NJU+DDT")], replaced=replaced) as module:
        scheduling = importlib.import_module("src.diffusion.flow_matching.scheduling")
        (class_name,) = MODULES[name]
        options: dict[str, Any] = {"scheduler": scheduling.LinearScheduler()}
        if class_name == "REPATrainer":
            # It is loaded from torch.hub. The features have the shape of the model's.
            module.DINOv2 = lambda _: nn.Identity()
            options |= {"align_layer": 1, "proj_denoiser_dim": 4, "proj_encoder_dim": 4}
        trainer = getattr(module, class_name)(**options)
        yield split_host(module, trainer, None, data())


@pytest.mark.hosts
@pytest.mark.parametrize("name", [name for name in MODULES if "disperse" not in name])
def test_the_trainers_of_ddt(name: str) -> None:
    split_step.check(partial(fresh_ddt, name))
