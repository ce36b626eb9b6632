"""Records the steps of an imagen-pytorch training, in the process of a run."""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from conformance.stand_ins import StandIns
from torch import Tensor

from whole_trainings.recording import Record
from whole_trainings.script_steps import Steps


def prepare(record: Record, work: Path, replayed: Sequence[Tensor] | None) -> list[str]:
    """Records the times of each step, the errors before weights, and what `train_step` returns.

    The class's own `p_losses` gets the times that a policy chose, and the unet has to get their noise levels.
    """
    # Its data come from a hub.
    sys.meta_path.append(StandIns(["datasets"]))
    # The host asks the hub for the width of T5 when it is imported.
    config = import_module("transformers").T5Config
    config.from_pretrained = _width_of_t5(config)
    module, trainer = import_module("imagen_pytorch.imagen_pytorch"), import_module("imagen_pytorch.trainer")
    steps = Steps(record)
    steps.watch_model(module.Imagen, "times", "p_losses")
    _replay_and_confirm(module, record, replayed)
    own_init: Callable[..., None] = module.Imagen.__init__

    @functools.wraps(own_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        own_init(self, *args, **kwargs)
        steps.watch_error(self, "loss_fn")

    module.Imagen.__init__ = init
    own_step: Callable[..., float] = trainer.ImagenTrainer.train_step

    def train_step(self: Any, **kwargs: Any) -> float:
        loss = own_step(self, **kwargs)
        steps.reported(loss)
        return loss

    trainer.ImagenTrainer.train_step = train_step
    return ["datasets (imported, never called)", "the hub (T5's config; no captions are encoded)"]


def _width_of_t5(config: Any) -> Callable[[str], Any]:
    def from_pretrained(name: str) -> Any:
        return config(d_model=768)

    return from_pretrained


def _replay_and_confirm(module: Any, record: Record, replayed: Sequence[Tensor] | None) -> None:
    own: Callable[..., Tensor] = module.Imagen.p_losses
    forward: Callable[..., Tensor] = module.Unet.forward
    levels: list[Tensor] = []

    @functools.wraps(own)
    def p_losses(
        self: Any, unet: Any, x_start: Tensor, times: Tensor, *, noise_scheduler: Any, **kwargs: Any
    ) -> Tensor:
        if replayed is not None and torch.is_grad_enabled():
            times = replayed[len(record.t)].clone()
        levels[:] = [noise_scheduler.get_condition(times)]
        return own(self, unet, x_start, times, noise_scheduler=noise_scheduler, **kwargs)

    @functools.wraps(forward)
    def seen(self: Any, x: Tensor, time: Tensor, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and not torch.equal(levels[0], time):
            raise RuntimeError("the unet got another noise level than that of the times")
        return forward(self, x, time, **kwargs)

    module.Imagen.p_losses, module.Unet.forward = p_losses, seen
