"""Seam D: a script draws its timesteps and makes its loss itself, as the diffusers examples do.

    seam = ScriptPolicy("speedit")
    timesteps = seam.timesteps(noise_scheduler, bsz, latents.device)  # in place of torch.randint(...)
    loss = seam.mse_loss(model_pred.float(), target.float())  # in place of F.mse_loss(..., reduction="mean")

The launcher makes these two edits in an unmodified script (`script_edits`). Without gradients, as in a
validation, both are what the script had: uniform timesteps and the plain squared error.

Dims: B batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.hosts.attachment import (
    LastDraw,
    PolicyHolder,
    TableOnDevices,
    refuse_double_weights,
)
from speedit_plugins.hosts.draws.draw_stream import DrawStream, draws_pairs
from speedit_plugins.hosts.draws.host_window import ALL_TIMES, windowed
from speedit_plugins.hosts.draws.noising import confirm_noising, watch_noising
from speedit_plugins.hosts.draws.observation import observe, refuse_missing_data
from speedit_plugins.hosts.draws.recomputation import refuse_checkpoint
from speedit_plugins.hosts.draws.waiting_draws import WaitingDraws
from speedit_plugins.hosts.draws.weighted_loss import is_one, scaled
from speedit_plugins.hosts.schedules import from_diffusers, prediction_type_of
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config

# So many draws may wait to be noised, before a policy that needs the data is refused.
_MAX_UNSEEN = 8
# Noise schedulers whose policies are kept.
_MAX_SCHEDULERS = 8


@dataclass(eq=False)
class _Scheduled:
    """The policy for a noise scheduler, and what the model predicted when it was built."""

    scheduler: Any
    policy: TimestepPolicy
    prediction_type: str


@dataclass(eq=False)
class _Drawn:
    """The timesteps (B,) of a draw, what it was drawn for, and the weights (T,) of that policy then."""

    index: Tensor
    scheduled: _Scheduled
    policy: TimestepPolicy
    weight: Tensor


class ScriptPolicy(PolicyHolder):
    """Draws timesteps for a script and weighs its squared errors.

    Args:
        policy: see `build_policy`. It is built for the noise scheduler of the first draw.
        prediction_type: what the script takes the squared error of, which its own code decides; None reads it
            from the noise scheduler, as the diffusers examples do.
        window: lowest and highest time that the script draws, in [0, 1], 1 is noise.
        generator, ranks_alike, num_strata: of the draws, see `with_policy`.
        on_use: called with the policy when the first loss is weighed.

    Raises:
        ValueError: the policy is bad.
    """

    def __init__(
        self,
        policy: str | Config = "recommended",
        *,
        prediction_type: str | None = None,
        window: tuple[float, float] = ALL_TIMES,
        generator: torch.Generator | None = None,
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        on_use: Callable[[TimestepPolicy], None] | None = None,
    ) -> None:
        policy = windowed(policy, window)
        # Raises now, not at the first draw, if a name or a parameter is wrong.
        self._stream = DrawStream(generator, ranks_alike=ranks_alike, num_strata=num_strata)
        self._stream.check(build_policy(policy, NoiseSchedule.linear(), prediction_type or "epsilon"))
        self._config = policy
        self._prediction_type = prediction_type
        self._on_use = on_use
        self._scheduled: list[_Scheduled] = []
        self._current: _Scheduled | None = None
        self._waiting_state: Mapping[str, Any] = {}
        self._draws: WaitingDraws[_Drawn] = WaitingDraws()
        self._weight = TableOnDevices()
        self._last_draw = LastDraw()
        # Draws in a row whose data were not noised so far.
        self._num_unseen = 0

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs, for the noise scheduler that was drawn for last, as it is now.

        Raises:
            ValueError: nothing was drawn yet, or the policy is bad.
        """
        return self._policy_of(self._in_use())

    def _in_use(self) -> _Scheduled:
        """The noise scheduler that was drawn for last. Raises ValueError if there was none."""
        if self._current is None:
            raise ValueError(
                "the script makes its loss before the policy drew timesteps: it draws them elsewhere (a"
                " timestep bias, a density of its own), or under torch.no_grad()"
            )
        return self._current

    def _policy_of(self, scheduled: _Scheduled) -> TimestepPolicy:
        # A script may set what the model predicts after its first draw (--prediction_type).
        stated = self._prediction_type or prediction_type_of(scheduled.scheduler)
        if scheduled.prediction_type != stated:
            built = self._built(scheduled.scheduler, stated)
            built.load_state_dict(scheduled.policy.state_dict())
            scheduled.policy, scheduled.prediction_type = built, stated
        return scheduled.policy

    def _built(self, scheduler: Any, prediction_type: str) -> TimestepPolicy:
        built = build_policy(self._config, from_diffusers(scheduler), prediction_type)
        warn_if_slow(built, prediction_type, self._config)
        return built

    def _scheduled_for(self, scheduler: Any) -> _Scheduled:
        for each in self._scheduled:
            if each.scheduler is scheduler:
                return each
        stated = self._prediction_type or prediction_type_of(scheduler)
        built = self._built(scheduler, stated)
        if self._waiting_state:
            built.load_state_dict(self._waiting_state)
            self._waiting_state = {}
        elif self._scheduled and self._scheduled[-1].policy.schedule.num_timesteps == len(built.density):
            # A script may make its scheduler anew.
            built.load_state_dict(self._scheduled[-1].policy.state_dict())
        self._scheduled.append(_Scheduled(scheduler, built, stated))
        del self._scheduled[:-_MAX_SCHEDULERS]
        return self._scheduled[-1]

    def state_dict(self) -> dict[str, Any]:
        """The policy's state; empty before the first draw. accelerate's `register_for_checkpointing` asks it.

        Example:
            >>> ScriptPolicy("clts").state_dict()
            {}
        """
        return dict(self._waiting_state) if self._current is None else self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, now or at the first draw.

        Raises:
            ValueError: the state is of another policy.
        """
        if state and self._current is not None:
            self.policy.load_state_dict(state)
        elif state:
            self._waiting_state = state

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
            generator: of the script's own draw. Its seed takes the place of `torch.initial_seed`.

        Raises:
            ValueError: the policy is bad, or the scheduler's index is no such timestep (EDM, flow matching).
        """
        check_scheduler(noise_scheduler)
        refuse_checkpoint()
        if not torch.is_grad_enabled():
            self.drawn_by_script()
            rows = len(noise_scheduler.alphas_cumprod)
            return torch.randint(0, rows, (batch_size,), device=device, generator=generator)
        self._current = self._scheduled_for(noise_scheduler)
        policy = self.policy
        policy.advance()
        # The script's own draw is dropped. After it, its noise is what it would be without a policy.
        high = policy.schedule.num_timesteps
        torch.randint(0, high, (batch_size,), device=device, generator=generator)
        seed = None if generator is None else generator.initial_seed()
        index = self._stream.draw(policy, batch_size, device, seed).index
        self._draws.add(index, _Drawn(index, self._current, policy, policy.weight))
        self._last_draw.drawn()
        self._watch(noise_scheduler, index, policy)
        return index

    def _watch(self, noise_scheduler: Any, index: Tensor, policy: TimestepPolicy) -> None:
        """The policy observes what the script noises at its timesteps (B,), for its next draw."""
        if policy.needs_data and self._num_unseen == _MAX_UNSEEN:
            refuse_missing_data(
                policy, f"{_MAX_UNSEEN} draws passed without a call of the noise scheduler's add_noise"
            )
        self._num_unseen += 1

        def see(data: Tensor) -> None:
            self._num_unseen = 0
            observe(policy, data)

        watch_noising(noise_scheduler, index, see)

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
        timesteps: Tensor | None = None,
    ) -> Tensor:
        """The squared error of a batch, with the weights of its timesteps. Without gradients it has none.

        Args:
            prediction: (B, ...), the rows for which timesteps were drawn.
            target: the same shape.
            reduction: "mean" is a scalar, the mean of weight * mse over the samples; "none" has the shape of
                the input.
            part: (i, n) if the script splits its batch by `chunk(n)`, as for prior preservation, and this is
                chunk i.
            timesteps: (B,) of the draw for this batch. None is the newest draw.

        Raises:
            ValueError: no timesteps were drawn with gradients, they were drawn for another number of rows, or
                in pairs for a batch that is split; the batch was noised at others; or it cannot be told to
                which of several draws the loss belongs.
        """
        if reduction not in ("mean", "none"):
            raise ValueError(f"mse_loss needs reduction 'mean' or 'none', got {reduction!r}")
        refuse_checkpoint()
        if not torch.is_grad_enabled():
            return functional.mse_loss(prediction, target, reduction=reduction)
        policy, index, table = self._of_loss(len(prediction), part, timesteps)
        error = functional.mse_loss(prediction, target, reduction="none")
        per_sample = error.flatten(1).mean(1)
        policy.update(index, per_sample.detach())
        if is_one(table):
            # The host's own reduction gives the host's loss to the bit.
            return error if reduction == "none" else functional.mse_loss(prediction, target)
        weight = self._weight.at(table, index)
        return scaled(error, weight) if reduction == "none" else scaled(per_sample, weight).mean()

    def weigh(self, loss: Tensor) -> Tensor:
        """A script's own loss (B, ...) of the newest draw, weighed. Without gradients it comes back as it is.

        Args:
            loss: of each sample or each value of it, before the mean over the batch.

        Raises:
            ValueError: see `mse_loss`; or the loss is reduced already.
        """
        refuse_checkpoint()
        if not torch.is_grad_enabled():
            return loss
        if loss.dim() == 0:
            raise ValueError("wanted the loss (B, ...) of each sample, got one that is reduced already")
        policy, index, table = self._of_loss(len(loss), (0, 1), None)
        index = index.to(loss.device)
        policy.update(index, loss.detach().flatten(1).mean(1) if loss.dim() > 1 else loss.detach())
        is_plain = is_one(table)
        return loss if is_plain else scaled(loss, self._weight.at(table, index))

    def _of_loss(
        self, num_rows: int, part: tuple[int, int], timesteps: Tensor | None
    ) -> tuple[TimestepPolicy, Tensor, Tensor]:
        """The policy, the timesteps (B,) and the weights (T,) of the draw to which a loss belongs."""
        self._in_use()
        drawn = self._draws.of_loss(timesteps, is_further_part=part[0] > 0)
        policy = self._policy_of(drawn.scheduled)
        index = self._rows(drawn.index, num_rows, part)
        self._last_draw.used()
        confirm_noising(drawn.scheduled.scheduler, drawn.index)
        if self._on_use is not None:
            self._on_use(policy)
            self._on_use = None
        # An update may change the policy's weights between the parts of a batch; the draw has those before.
        table = drawn.weight if drawn.policy is policy else policy.weight
        drawn.policy, drawn.weight = policy, table
        return policy, index, table

    def has_drawn(self, timesteps: Any) -> bool:
        """Whether these are the timesteps (B,) of a draw that waits for its loss, or of one of the last."""
        return self._draws.has(timesteps)

    def refuse_weights(self, weighing: str, remedy: str, timesteps: Tensor | None = None) -> None:
        """Raises ValueError if the policy weighs or learns, for a script that weighs its training loss.

        Args:
            weighing: the beginning of the message: who weighs, and by what.
            remedy: how to switch the script's weights off.
            timesteps: for which the script makes its weights (B,). It may make them without gradients; others
                than the policy's are then those of a validation.
        """
        if not torch.is_grad_enabled() and not self._draws.is_one(timesteps):
            return
        refuse_double_weights(self.policy, weighing, remedy)
        if self.policy.learns:
            raise ValueError(
                f"{weighing}, after {self.policy.name!r} has learned from the plain error, which is not the"
                f" loss that is minimised: {remedy}, or take a policy that does not learn"
            )

    def _rows(self, index: Tensor, num_rows: int, part: tuple[int, int]) -> Tensor:
        """The timesteps of one chunk of the batch, checked against its rows."""
        number, num_parts = part
        if not 0 <= number < num_parts:
            raise ValueError(f"part needs (i, n) with 0 <= i < n, got {part}")
        if num_parts > 1 and draws_pairs(self.policy):
            raise ValueError(
                f"{self.policy.name!r} draws pairs, whose second half mirrors the first, and this script"
                " splits its batch into halves (prior preservation): take a policy with independent draws,"
                " such as 'speedit'"
            )
        chunk = index.chunk(num_parts)[number]
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
            " timestep. For flow matching there is FlowScript (integrations/diffusers_flow); EDM has"
            " nothing to gain"
        )
