"""Seam D for flow matching: a script draws rows of its scheduler's table of sigmas, as for SD3 and Flux.

    seam = FlowScript("speed", noise_scheduler_copy, prediction_type="flow")
    indices = seam.indices(indices, model_input)  # after the script's own draw
    loss = seam.mse_loss(model_pred, target)  # in place of torch.mean((weighting * (...) ** 2)...)

Row 0 of such a table is noise. Without gradients, as in a validation, draw and loss are the script's own.

Dims: T timesteps, B batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import (
    LastDraw,
    PolicyHolder,
    TableOnDevices,
    refuse_double_weights,
)
from speedit_plugins.hosts.draws.draw_stream import DrawStream, draws_pairs
from speedit_plugins.hosts.draws.observation import observe
from speedit_plugins.hosts.draws.recomputation import refuse_checkpoint
from speedit_plugins.hosts.draws.waiting_draws import WaitingDraws
from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.hosts.schedules import from_diffusers, shift_of
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.policies.shifted_boundary import with_shifted_boundary
from speedit_plugins.registry import Config


class FlowScript(PolicyHolder):
    """Draws rows of a flow-matching scheduler for a script, and weighs its squared errors.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> generator = torch.Generator().manual_seed(0)
        >>> scheduler = FlowMatchEulerDiscreteScheduler()
        >>> seam = FlowScript("speed", scheduler, prediction_type="flow", generator=generator)
        >>> rows = seam.indices(torch.zeros(3, dtype=torch.int64))
        >>> scheduler.sigmas[rows].round(decimals=2)
        tensor([0.98, 0.72, 0.46])
        >>> seam.mse_loss(torch.ones(3, 2), torch.zeros(3, 2)).shape
        torch.Size([])

    Args:
        policy: see `build_policy`. `speed` moves its boundary with the scheduler's `shift`, unless the config
            gives `snr_boundary` or `tau`.
        noise_scheduler: a flow-matching scheduler of diffusers, not yet set to inference steps.
        prediction_type: what the script takes the squared error of. "flow" if its target is noise - data;
            "x0" if it turns the model's output into data first (`--precondition_outputs`).
        weighting: the script's own weights as a function of sigma (T,); None if it has none.
        num_parts: into how many parts the script splits its batch by `chunk` before it makes its losses: 2
            with prior preservation.
        generator, ranks_alike, num_strata: of the draws, see `with_policy`.

    Raises:
        ValueError: the policy is bad, has weights and so has the script, or draws pairs for a batch that is
            split; or the scheduler is not one of flow matching.
    """

    def __init__(
        self,
        policy: str | Config,
        noise_scheduler: Any,
        *,
        prediction_type: str,
        weighting: Callable[[Tensor], Tensor] | None = None,
        num_parts: int = 1,
        generator: torch.Generator | None = None,
        ranks_alike: int | None = None,
        num_strata: int | None = None,
    ) -> None:
        schedule = from_diffusers(noise_scheduler)
        if not torch.allclose(schedule.alpha + schedule.sigma, torch.ones_like(schedule.sigma)):
            raise ValueError(
                f"{type(noise_scheduler).__name__} is not a scheduler of flow matching, where the scales of"
                " data and noise sum to 1: take speedit_plugins.hosts.script.ScriptPolicy"
            )
        policy = with_shifted_boundary(policy, shift_of(noise_scheduler))
        self.policy: TimestepPolicy = build_policy(policy, schedule, prediction_type)
        warn_if_slow(self.policy, prediction_type, policy)
        sigma = schedule.sigma.float()
        # The script's weight of each index, (T,).
        self._own_weight = torch.ones_like(sigma) if weighting is None else weighting(sigma).float()
        if not is_constant(self._own_weight):
            refuse_double_weights(
                self.policy,
                "the script's --weighting_scheme weighs the loss",
                "take a scheme without weights, such as logit_normal",
            )
        if num_parts > 1 and draws_pairs(self.policy):
            raise ValueError(
                f"{self.policy.name!r} draws pairs, whose second half mirrors the first, and this script"
                " splits its batch (prior preservation): take a policy with independent draws"
            )
        self._weight = TableOnDevices()
        self._num_parts = num_parts
        self._stream = DrawStream(generator, ranks_alike=ranks_alike, num_strata=num_strata)
        self._stream.check(self.policy)
        self._draws: WaitingDraws[TimestepDraw] = WaitingDraws()
        self._has_drawn = False
        # The last index (B,), of the policy's draw or of the script's.
        self._last_index: Tensor | None = None
        self._last_draw = LastDraw()

    @classmethod
    def from_args(
        cls,
        policy: str | Config,
        noise_scheduler: Any,
        args: Any,
        weighting: Callable[[str, Tensor], Tensor],
        **options: Any,
    ) -> "FlowScript":
        """The same for the options of one of diffusers' DreamBooth scripts.

        Args:
            policy, noise_scheduler: see `FlowScript`.
            args: the script's options `weighting_scheme` and `with_prior_preservation`; and
                `precondition_outputs`, if it has that.
            weighting: diffusers' `compute_loss_weighting_for_sd3`.
            options: of the draws, see `FlowScript`.

        Raises:
            ValueError: see `FlowScript`.
        """
        return cls(
            policy,
            noise_scheduler,
            # Flux's scripts have no such option, and their target is noise - data.
            prediction_type="x0" if getattr(args, "precondition_outputs", False) else "flow",
            weighting=lambda sigma: weighting(args.weighting_scheme, sigma),
            num_parts=2 if args.with_prior_preservation else 1,
            **options,
        )

    def indices(self, own: Tensor, data: Tensor | None = None) -> Tensor:
        """Rows int64 (B,) of the scheduler's table at which a batch is noised and trained.

        Each call with gradients is one step of a curriculum. Without gradients the script's rows come back.

        Args:
            own: the rows (B,) that the script drew.
            data: what is noised at them, (B, ...): the script's `model_input`. The policy observes it.

        Raises:
            ValueError: the policy needs the data, and they are None.
        """
        refuse_checkpoint()
        last_row = len(self._own_weight) - 1
        if not torch.is_grad_enabled():
            self._last_draw.drawn_by_host()
            self._last_index = last_row - own
            return own
        self.policy.advance()
        observe(self.policy, data)
        draw = self._stream.draw(self.policy, len(own), own.device)
        rows = last_row - draw.index
        self._draws.add(rows, draw)
        self._last_index = draw.index
        self._has_drawn = True
        self._last_draw.drawn()
        return rows

    def mse_loss(
        self, prediction: Tensor, target: Tensor, *, part: int = 0, indices: Tensor | None = None
    ) -> Tensor:
        """The mean of weight * squared error of a batch, float32, a scalar.

        With gradients the weight is the policy's times the script's. Without gradients it is the script's.

        Args:
            prediction: (B, ...), the rows for which indices were drawn.
            target: the same shape.
            part: of a batch that the script splits, from 0.
            indices: (B,) of the draw for this batch; None is the newest draw.

        Raises:
            ValueError: no indices were drawn (with gradients, for a loss with gradients), they were drawn for
                another number of rows, or it cannot be told to which of several draws the loss belongs.
        """
        refuse_checkpoint()
        # In float32, as in the scripts.
        error = ((prediction.float() - target.float()) ** 2).flatten(1).mean(1)
        missing = "no indices were drawn for this loss: call indices(...) after the script's draw"
        if not torch.is_grad_enabled():
            if self._last_index is None:
                raise ValueError(missing)
            rows = self._chunk(self._last_index, len(error), part)
            return (self._weight.at(self._own_weight, rows).to(error.device) * error).mean()
        self._last_draw.used()
        if not self._has_drawn:
            raise ValueError(missing)
        draw = self._draws.of_loss(indices, is_further_part=part > 0)
        rows = self._chunk(draw.index, len(error), part)
        weighed = self._weight.at(self._own_weight, rows).to(error.device) * error
        self.policy.update(rows.to(error.device), weighed.detach())
        # The weights at the draw, for every part of the batch: an update may change the policy's.
        return (self._chunk(draw.weight, len(error), part).to(error.device) * weighed).mean()

    def state_dict(self) -> dict[str, Any]:
        """The policy's state. accelerate's `register_for_checkpointing` asks it."""
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned.

        Raises:
            ValueError: the state is from another policy.
        """
        self.policy.load_state_dict(state)

    def _chunk(self, values: Tensor, num_rows: int, part: int) -> Tensor:
        """The values (B,) of one part of the batch, checked against its rows."""
        if not 0 <= part < self._num_parts:
            raise ValueError(f"part needs a number from 0 to {self._num_parts - 1}, got {part}")
        chunks = values.chunk(self._num_parts)
        if len(chunks) != self._num_parts or len(chunks[part]) != num_rows:
            raise ValueError(
                f"the loss is made of {num_rows} rows, and indices were drawn for {len(values)} in"
                f" {self._num_parts} part(s): a script that splits its batch (prior preservation) needs"
                " num_parts=2, and part=1 for the loss of the second half"
            )
        return chunks[part]
