"""Seam D: a script draws its timesteps and makes its loss itself, as the diffusers examples do.

    seam = ScriptPolicy("speedit")
    timesteps = seam.timesteps(noise_scheduler, bsz, latents.device)  # in place of torch.randint(...)
    loss = seam.mse_loss(model_pred.float(), target.float())  # in place of F.mse_loss(..., reduction="mean")

The launcher makes these two edits in an unmodified script (`script_edits`). Without gradients, as in a
validation, both are what the script had: uniform timesteps and the plain squared error.

Dims: B batch.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.hosts.attachment import (
    LastDraw,
    TableOnDevices,
    draws_pairs,
    is_constant,
    refuse_double_weights,
    scaled,
)
from speedit_plugins.hosts.noising import confirm_noising, watch_noising
from speedit_plugins.hosts.schedules import from_diffusers, prediction_type_of
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config


class ScriptPolicy:
    """Draws timesteps for a script and weighs its squared errors.

    Args:
        policy: see `build_policy`. It is built for the noise scheduler of the first draw.
        prediction_type: what the model predicts; None reads it from the noise scheduler.
        generator: for the draws; None is the device's global one.
        on_use: called with the policy when the first loss is weighed.

    Raises:
        ValueError: the policy is bad.
    """

    def __init__(
        self,
        policy: str | Config = "speedit",
        *,
        prediction_type: str | None = None,
        generator: torch.Generator | None = None,
        on_use: Callable[[TimestepPolicy], None] | None = None,
    ) -> None:
        # Raises now, not at the first draw, if a name or a parameter is wrong.
        build_policy(policy, NoiseSchedule.linear(), prediction_type or "epsilon")
        self._config = policy
        self._prediction_type = prediction_type
        self._generator = generator
        self._on_use = on_use
        self._scheduler: Any = None
        self._built: tuple[TimestepPolicy, str] | None = None
        self._index: Tensor | None = None
        self._drawn: tuple[TimestepPolicy | None, Tensor] = None, torch.empty(0)
        self._weight = TableOnDevices()
        self._last_draw = LastDraw()
        self.num_draws = 0

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs, for the noise scheduler as it is now.

        Raises:
            ValueError: nothing was drawn yet, or the policy is bad.
        """
        if self._scheduler is None:
            raise ValueError(
                "the script makes its loss before the policy drew timesteps: it draws them elsewhere (a"
                " timestep bias, a density of its own), or under torch.no_grad()"
            )
        # A script may set what the model predicts after its first draw (--prediction_type).
        stated = self._prediction_type or prediction_type_of(self._scheduler)
        if self._built is None or self._built[1] != stated:
            self._built = build_policy(self._config, from_diffusers(self._scheduler), stated), stated
        return self._built[0]

    def timesteps(
        self,
        noise_scheduler: Any,
        batch_size: int,
        device: torch.device | str = "cpu",
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Timesteps int64 (B,) at which a batch is noised and trained. `mse_loss` weighs for them.

        After each draw the scheduler's next `add_noise` raises a ValueError if the script has changed its
        timesteps in between. Without gradients the timesteps are uniform, from `generator` or the device's
        global one, and nothing is counted.

        Args:
            noise_scheduler: one of diffusers with `alphas_cumprod`; rows of that table are the timesteps that
                its `add_noise` and the model take.
            batch_size: B, >= 1.
            device: where the timesteps are drawn.
            generator: for this draw; None is the constructor's.

        Raises:
            ValueError: the policy is bad, or the scheduler's index is no such timestep (EDM, flow matching).
        """
        check_scheduler(noise_scheduler)
        if not torch.is_grad_enabled():
            self.drawn_by_script()
            high = len(noise_scheduler.alphas_cumprod)
            return torch.randint(0, high, (batch_size,), device=device, generator=generator)
        if noise_scheduler is not self._scheduler:
            self._scheduler, self._built = noise_scheduler, None
        self.policy.advance(self.num_draws)
        self.num_draws += 1
        source = self._generator if generator is None else generator
        self._index = self.policy.draw(batch_size, device=device, generator=source).index
        self._drawn = self.policy, self.policy.weight
        self._last_draw.drawn()
        watch_noising(noise_scheduler, self._index)
        return self._index

    def drawn_by_script(self) -> None:
        """Notes that the script drew without gradients. A training loss for that draw is refused."""
        self._last_draw.drawn_by_host()

    def mse_loss(
        self,
        prediction: Tensor,
        target: Tensor,
        reduction: Literal["mean", "none"] = "mean",
        *,
        part: tuple[int, int] = (0, 1),
    ) -> Tensor:
        """The squared error of a batch, with the weights of its timesteps. Without gradients it has none.

        Args:
            prediction: (B, ...), the rows for which the last timesteps were drawn.
            target: the same shape.
            reduction: "mean" is a scalar, the mean of weight * mse over the samples; "none" has the shape of
                the input.
            part: (i, n) if the script splits its batch by `chunk(n)`, as for prior preservation, and this is
                chunk i.

        Raises:
            ValueError: no timesteps were drawn with gradients, they were drawn for another number of rows, or
                in pairs for a batch that is split, or the batch was noised at others.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"mse_loss needs reduction 'mean' or 'none', got {reduction!r}")
        if not torch.is_grad_enabled():
            return functional.mse_loss(prediction, target, reduction=reduction)
        policy, index = self.policy, self._rows(len(prediction), part)
        self._last_draw.used()
        confirm_noising(self._scheduler)
        if self._on_use is not None:
            self._on_use(policy)
            self._on_use = None
        if self._drawn[0] is not policy:
            self._drawn = policy, policy.weight
        # The table at the draw, for every part of the batch: an update may have changed the policy's.
        table = self._drawn[1]
        error = functional.mse_loss(prediction, target, reduction="none")
        per_sample = error.flatten(1).mean(1)
        policy.update(index, per_sample.detach())
        if is_constant(table) and float(table[0]) == 1:
            # The host's own reduction gives the host's loss to the bit.
            return error if reduction == "none" else functional.mse_loss(prediction, target)
        weight = self._weight.at(table, index)
        return scaled(error, weight) if reduction == "none" else scaled(per_sample, weight).mean()

    def refuse_weights(self, weighing: str, remedy: str, timesteps: Tensor | None = None) -> None:
        """Raises ValueError if the policy has weights, for a script that weighs its training loss itself.

        Args:
            weighing: the beginning of the message: who weighs, and by what.
            remedy: how to switch the script's weights off.
            timesteps: for which the script makes its weights (B,). It may make them without gradients; others
                than the policy's are then those of a validation.
        """
        if not torch.is_grad_enabled() and (timesteps is None or timesteps is not self._index):
            return
        refuse_double_weights(self.policy, weighing, remedy)

    def _rows(self, num_rows: int, part: tuple[int, int]) -> Tensor:
        """The timesteps of one chunk of the batch, checked against its rows."""
        number, num_parts = part
        assert self._index is not None  # there is a policy, so there was a draw
        if not 0 <= number < num_parts:
            raise ValueError(f"part needs (i, n) with 0 <= i < n, got {part}")
        if num_parts > 1 and draws_pairs(self.policy):
            raise ValueError(
                f"{self.policy.name!r} draws pairs, whose second half mirrors the first, and this script"
                " splits its batch into halves (prior preservation): take a policy with independent draws,"
                " such as 'speedit'"
            )
        chunk = self._index.chunk(num_parts)[number]
        if len(chunk) != num_rows:
            raise ValueError(
                f"the loss is made of {num_rows} rows, and {len(chunk)} timesteps were drawn: a script that"
                " splits its batch (prior preservation) is edited by hand and passes part=(0, 2) and part=(1,"
                " 2), see integrations/diffusers; one that trains pairs at one t (DPO) cannot take a policy"
                " here"
            )
        return chunk


def check_scheduler(noise_scheduler: Any) -> None:
    """Raises ValueError if what a script draws for this scheduler is not a timestep."""
    if getattr(noise_scheduler, "alphas_cumprod", None) is None:
        raise ValueError(
            f"{type(noise_scheduler).__name__} has no alphas_cumprod: what a script draws for it is not a"
            " timestep. For flow matching, call policy.draw (integrations/diffusers); EDM has nothing to gain"
        )
