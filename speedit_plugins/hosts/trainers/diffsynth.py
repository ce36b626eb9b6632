"""DiffSynth-Studio: its losses draw one row of the scheduler's table for a step, which has one sample.

    import diffsynth.diffusion.loss as module
    adapt(module, partial(SeparateDraws, "auto"))

Three functions train a flow or, with its DDIMScheduler, a model of noise: `FlowMatchSFTLoss`, and two for
video with sound. They draw, make the loss, and multiply it by `scheduler.training_weight`, a bell over the
rows of a flow. A policy with weights takes the place of these weights; any other keeps them. The host's other
losses stay as they are.

Dims: N rows of the scheduler's table, T timesteps of the policy.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.hosts.edits.statement_edits import Edit, rewritten
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import exchange
from speedit_plugins.hosts.trainers.rows import clock_of_rows, refuse_outside
from speedit_plugins.policies.schedule import NoiseSchedule

_HOST = "DiffSynth-Studio"
_PREDICTS = {"epsilon": "epsilon", "v_prediction": "v"}
_DRAW = Edit(
    "timestep_id = torch.randint(min_timestep_boundary, max_timestep_boundary, (1,))",
    "def speedit_drawn():\n"
    "    HOSTS_STATEMENT\n"
    "    return timestep_id\n"
    "timestep_id = speedit_row(\n"
    "    pipe, inputs['input_latents'], speedit_drawn, (min_timestep_boundary, max_timestep_boundary)\n"
    ")",
)
_OWN_WEIGHT, _OWN_WEIGHT_OF_SOUND = (
    Edit(begins, "if speedit_keeps_weights():\n    HOSTS_STATEMENT")
    for begins in (
        "loss = loss * pipe.scheduler.training_weight(",
        "loss_audio = loss_audio * pipe.scheduler",
    )
)
_RETURN = Edit("return loss", "return speedit_weigh(loss)")
_SILENT = (_DRAW, _OWN_WEIGHT, _RETURN)
_FUNCTIONS: Mapping[str, tuple[Edit, ...]] = {
    "FlowMatchSFTLoss": _SILENT,
    "FlowMatchSFTAudioVideoLoss": (*_SILENT, _OWN_WEIGHT_OF_SOUND),
    "FlowMatchSFTMiniMaxH3AudioVideoLoss": (*_SILENT, _OWN_WEIGHT_OF_SOUND),
}


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into DiffSynth-Studio's training losses.

    Args:
        module: its `diffsynth.diffusion.loss`. Names that its package has taken from it follow.
        draws_of: makes the `SeparateDraws`, once for each scheduler that is trained with.

    Raises:
        ValueError: none of the three functions is there, a statement in one is missing, or it has a policy.
    """
    known = [name for name in _FUNCTIONS if hasattr(module, name)]
    if not known:
        raise ValueError(
            f"{module.__name__} of {_HOST} has none of {', '.join(_FUNCTIONS)}: the plugin knows another"
            " version"
        )
    losses = _Losses(draws_of)
    package = sys.modules.get(module.__name__.rpartition(".")[0])
    for name in known:
        own = getattr(module, name)
        names = {
            "speedit_row": losses.row,
            "speedit_keeps_weights": losses.keeps_weights,
            "speedit_weigh": losses.weigh,
        }
        exchange(module, name, partial(rewritten, edits=_FUNCTIONS[name], names=names, host=_HOST))
        if getattr(package, name, None) is own:
            setattr(package, name, getattr(module, name))


@dataclass
class _Losses:
    """What the changed statements call, and the draws for the scheduler that is trained with."""

    draws_of: Callable[..., SeparateDraws]
    draws: SeparateDraws | None = None
    scheduler: Any = None
    # The scheduler's table and a dtype, and the times of its rows.
    table: tuple[Any, Any, Tensor] | None = None

    def row(self, pipe: Any, data: Tensor, drawn: Callable[[], Tensor], bounds: tuple[int, int]) -> Tensor:
        """The row int64 (1,) of the scheduler's table, in [bounds)."""
        if self.draws is None or pipe.scheduler is not self.scheduler:
            self.draws, self.scheduler = self._built(pipe.scheduler), pipe.scheduler
        times = self._times(pipe)
        refuse_outside(self.draws.policy, times, bounds, "max_ and min_timestep_boundary")
        return self.draws.times(drawn, data, clock_of_rows(times, bounds))

    def keeps_weights(self) -> bool:
        """Whether the host weighs the loss that it makes now."""
        return not torch.is_grad_enabled() or self.draws is None or is_constant(self.draws.policy.weight)

    def weigh(self, loss: Tensor) -> Tensor:
        """The loss () of a step with the weight of its draw."""
        if not torch.is_grad_enabled():
            return loss
        if self.draws is None:
            raise ValueError(f"{_HOST} makes a loss, and the policy drew no timesteps for it")
        return self.draws.weigh(loss.reshape(1)).reshape(loss.shape)

    def _times(self, pipe: Any) -> Tensor:
        timesteps, dtype = pipe.scheduler.timesteps, pipe.torch_dtype
        if self.table is None or self.table[0] is not timesteps or self.table[1] != dtype:
            self.table = (timesteps, dtype, _times(pipe.scheduler, dtype))
        return self.table[2]

    def _built(self, scheduler: Any) -> SeparateDraws:
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            return self.draws_of(prediction_type="flow")
        schedule = NoiseSchedule.from_alphas_cumprod(table)
        return self.draws_of(prediction_type=_PREDICTS[scheduler.prediction_type], schedule=schedule)


def _times(scheduler: Any, dtype: torch.dtype) -> Tensor:
    """The time float32 (N,) at which each row of a scheduler is noised.

    The host rounds the timestep of a row to the dtype of the model first. In bfloat16 it is another row then.
    """
    timesteps = scheduler.timesteps.cpu()
    rounded = timesteps.to(dtype).to(timesteps)
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        T = len(scheduler.alphas_cumprod)
        index: Tensor = (rounded.long().clamp(0, T - 1) + 0.5) / T
        return index
    nearest = (timesteps.view(1, -1) - rounded.view(-1, 1)).abs().argmin(1)
    sigmas: Tensor = scheduler.sigmas.cpu().float()
    return sigmas[nearest]
