"""ai-toolkit: its trainer draws rows of its scheduler's table, and weighs the loss of each sample.

    import extensions_built_in.sd_trainer.SDTrainer as module
    adapt(module, partial(SeparateDraws, "auto"))

Both are statements of long methods, and these two statements are changed (`statement_edits`). The timestep of
a row is 1000 times our time for a flow, and an index of the noise schedule for the other models. The host
draws without gradients: all its draws are those of a training step.

Dims: N rows of the table, B batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_double_weights
from speedit_plugins.hosts.edits.statement_edits import Edit, rewritten
from speedit_plugins.hosts.schedules import from_diffusers
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import exchange
from speedit_plugins.hosts.trainers.rows import clock_of_rows, refuse_outside

_HOST = "ai-toolkit"
_DRAWING, _LOSS = "process_general_training_batch", "calculate_loss"
_DRAW = Edit(
    "with self.timer('prepare_timesteps_indices'):",
    "def speedit_drawn():\n"
    "    HOSTS_STATEMENT\n"
    "    return timestep_indices.long()\n"
    "timestep_indices = speedit_rows(self, latents, speedit_drawn, (min_noise_steps, max_noise_steps))",
)
_MEAN = Edit("loss = loss.mean()", "loss = speedit_weigh(self, loss)\nHOSTS_STATEMENT")
# Few rows that a student learns; and steps whose t changes after the draw.
_FEW_STEPS = ("one_step", "two_step", "four_step", "eight_step")
_CHANGES_T = "next_sample"


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into ai-toolkit's trainer.

    Args:
        module: its `extensions_built_in.sd_trainer.SDTrainer`.
        draws_of: makes the `SeparateDraws`, once for each noise scheduler that is trained with.

    Raises:
        ValueError: a method or a statement that is changed is missing, or has a policy already.
    """
    trainer = module.SDTrainer
    steps = _Steps(draws_of)
    drawing = next((each for each in trainer.__mro__ if _DRAWING in vars(each)), trainer)
    for owner, name, edit in ((drawing, _DRAWING, _DRAW), (trainer, _LOSS, _MEAN)):
        names = {"speedit_rows": steps.rows, "speedit_weigh": steps.weigh}
        exchange(owner, name, partial(rewritten, edits=[edit], names=names, host=_HOST, owner=owner))


@dataclass
class _Steps:
    """What the changed statements call, and the draws for the scheduler that is trained with."""

    draws_of: Callable[..., SeparateDraws]
    draws: SeparateDraws | None = None
    scheduler: Any = None

    def rows(
        self, trainer: Any, latents: Tensor, drawn: Callable[[], Tensor], bounds: tuple[int, int]
    ) -> Tensor:
        """Rows int64 (B,) of the scheduler's table, between the bounds, the last one included."""
        scheduler, options = trainer.sd.noise_scheduler, trainer.train_config
        if self.draws is None or scheduler is not self.scheduler:
            self.draws, self.scheduler = self._built(trainer), scheduler
        self._refuse(options)
        device = trainer.device_torch
        timesteps = scheduler.timesteps.to(device).float()
        scale, offset = (1000, 0.0) if trainer.sd.is_flow_matching else (len(scheduler.alphas_cumprod), 0.5)
        times = (timesteps + offset) / scale
        rows = (int(bounds[0]), int(bounds[1]) + 1)
        refuse_outside(self.draws.policy, times, rows, "min_denoising_steps and max_denoising_steps")
        data = latents * options.latent_multiplier
        with torch.enable_grad():
            return self.draws.times(drawn, data, clock_of_rows(times, rows))

    def weigh(self, trainer: Any, loss: Tensor) -> Tensor:
        """The losses (B,), each times its weight."""
        if not torch.is_grad_enabled():
            return loss
        if self.draws is None:
            raise ValueError(f"{_HOST} makes a loss, and the policy drew no timesteps for it")
        weighing = [
            *(name for name in _WEIGHTS if getattr(trainer.train_config, name, None)),
            *(["timestep_type weighted"] if trainer.train_config.timestep_type == "weighted" else []),
            *(["loss_target"] if trainer.train_config.loss_target in ("source", "unaugmented") else []),
        ]
        if weighing:
            name = " and ".join(weighing)
            refuse_double_weights(
                self.draws.policy, f"ai-toolkit's {name} weighs the loss", f"leave out {name}"
            )
        return self.draws.weigh(loss)

    def _refuse(self, options: Any) -> None:
        """Raises ValueError for ways of training in which t is not one of a law over the whole table."""
        assert self.draws is not None
        kind = options.timestep_type
        if kind == _CHANGES_T:
            raise ValueError(f"ai-toolkit's timestep_type {kind} changes t after the draw: no policy fits")
        if kind in _FEW_STEPS and not self.draws.policy.is_relative:
            raise ValueError(
                f"ai-toolkit's timestep_type {kind} trains at few rows, and {self.draws.policy.name!r} draws"
                " by a law of its own: take another timestep_type, or a policy that thins, such as 'uniform'"
            )

    def _built(self, trainer: Any) -> SeparateDraws:
        if trainer.sd.is_flow_matching:
            return self.draws_of(prediction_type="flow")
        kind = "v" if trainer.sd.prediction_type == "v_prediction" else "epsilon"
        return self.draws_of(prediction_type=kind, schedule=from_diffusers(trainer.sd.noise_scheduler))


_WEIGHTS = (
    "snr_gamma",
    "min_snr_gamma",
    "learnable_snr_gos",
    "linear_timesteps",
    "linear_timesteps2",
    "t0_velocity_equiv_weight",
)
