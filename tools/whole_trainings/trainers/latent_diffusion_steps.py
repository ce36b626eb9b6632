"""Records the steps of a latent-diffusion training, in the process of a run."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance.stand_ins import StandIns
from torch import Tensor

from whole_trainings.recording import Record
from whole_trainings.script_steps import Steps
from whole_trainings.stand_ins import OnCpu

STAND_INS = (
    "torch.cuda (device 'cpu'; its memory is 0)",
    "taming (imported, never called)",
    "torch.load as before torch 2.6, for Lightning's checkpoints",
    "PIL.Image.LINEAR, numpy.Inf, Lightning's enums in texts (as before Pillow 10, NumPy 2, Python 3.11)",
)


def prepare(record: Record, work: Path, replayed: Sequence[Tensor] | None) -> list[str]:
    """Records the t that the UNet sees, the first error of a step, and the loss of `training_step`."""
    sys.meta_path.append(StandIns(["taming"]))
    image = import_module("PIL.Image")
    vars(image)["LINEAR"] = image.BILINEAR
    vars(np)["Inf"] = np.inf
    enum = import_module("pytorch_lightning.utilities.enums").LightningEnum
    enum.__format__ = _as_value
    # What Lightning 1.4 saves has classes as keys.
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    for name in ("reset_peak_memory_stats", "synchronize", "max_memory_allocated"):
        setattr(torch.cuda, name, _nothing)
    OnCpu().__enter__()
    ddpm, steps = import_module("ldm.models.diffusion.ddpm"), Steps(record)
    steps.watch_model(import_module("ldm.modules.diffusionmodules.openaimodel").UNetModel, "timesteps")
    steps.watch_error(ddpm.DDPM, "get_loss", is_repeated=True)
    own: Callable[..., Tensor] = ddpm.DDPM.training_step

    @functools.wraps(own)
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = own(self, batch, batch_idx)
        steps.reported(loss)
        return loss

    ddpm.DDPM.training_step = training_step
    _save_weights_beside(import_module("pytorch_lightning").Trainer)
    if replayed is not None:
        _replay(ddpm.LatentDiffusion, record, replayed)
    return list(STAND_INS)


def _save_weights_beside(trainer: Any) -> None:
    """Each checkpoint NAME.ckpt gets its weights alone in NAME.weights, to be read without Lightning."""
    own: Callable[..., None] = trainer.save_checkpoint

    @functools.wraps(own)
    def save_checkpoint(self: Any, filepath: Any, *args: Any, **kwargs: Any) -> None:
        own(self, filepath, *args, **kwargs)
        torch.save(self.lightning_module.state_dict(), Path(filepath).with_suffix(".weights"))

    trainer.save_checkpoint = save_checkpoint


def _replay(host: Any, record: Record, replayed: Sequence[Tensor]) -> None:
    own: Callable[..., Any] = host.p_losses

    @functools.wraps(own)
    def p_losses(self: Any, x_start: Tensor, cond: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        t = replayed[len(record.t)].clone() if torch.is_grad_enabled() else t
        return own(self, x_start, cond, t, *args, **kwargs)

    host.p_losses = p_losses


def _as_value(member: Any, spec: str) -> str:
    return format(str(member.value), spec)


def _nothing(*_: Any, **__: Any) -> int:
    return 0
