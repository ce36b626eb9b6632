"""A flow host that draws its times in one place and makes its loss in another.

    draws = SeparateDraws("auto")
    sigmas = draws.times(lambda: torch.rand(bsz), latents)  # in place of the host's own draw
    loss = draws.weigh(loss)  # the loss (B, ...) before the host reduces it

The adapters of such hosts replace two of their functions by these two calls. Without gradients, as in a
validation, draw and loss are the host's own.

Dims: B batch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import LastDraw
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.host_window import ALL_TIMES, windowed
from speedit_plugins.hosts.draws.observation import observe, refuse_missing_data
from speedit_plugins.hosts.draws.recomputation import refuse_checkpoint
from speedit_plugins.hosts.draws.waiting_draws import MAX_WAITING, WaitingDraws
from speedit_plugins.hosts.draws.weighted_loss import is_constant, is_one, scaled
from speedit_plugins.hosts.flow import FlowAttachment, HostsTime
from speedit_plugins.hosts.schedules import NUM_BINS
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.policies.shifted_boundary import moves_with_shift
from speedit_plugins.registry import Config

# Draws without data after which a policy that needs data is refused.
_MAX_UNSEEN = 8
# A host whose t is our time: in [0, 1], 1 is noise.
OUR_TIME = HostsTime(torch.Tensor.float, lambda draw, t: draw.time.to(t))


class SeparateDraws(FlowAttachment):
    """Draws the times of a flow for a host, and weighs the losses that come after them.

    A policy with a law of its own replaces the host's draws, any other thins them (`FlowAttachment`).

    Args:
        policy: see `build_policy`.
        schedule: of the host's noise levels; None is a rectified flow. A host that draws an index of T
            timesteps passes its schedule, and a `clock` whose time is (index + 1/2) / T.
        prediction_type: what the host takes the squared error of.
        sees_later: whether the host shows its data to `see` after the draw; else `times` gets them.
        without_loss: says why no loss can be weighed, if the host's is the mean of a batch already; a policy
            that weighs or learns is then refused with it. "" if each sample has a loss.
        window: lowest and highest time of the host's own law, in [0, 1], 1 is noise. A law of the policy's
            own is cut to it.
        stream: of random numbers; None is one for each data-parallel rank, see `DrawStream`.
        on_use: called with this object before its first draw with gradients.

    Raises:
        ValueError: the policy is bad, thins in pairs or strata, or weighs where no loss can be weighed.

    Example:
        >>> stream = DrawStream(torch.Generator().manual_seed(0))
        >>> draws = SeparateDraws("logit_normal", stream=stream)
        >>> draws.times(lambda: torch.rand(3)).round(decimals=2)
        tensor([0.8700, 0.6300, 0.4700])
        >>> draws.weigh(torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        policy: str | Config = "recommended",
        *,
        schedule: NoiseSchedule | None = None,
        prediction_type: str = "flow",
        sees_later: bool = False,
        without_loss: str = "",
        window: tuple[float, float] = ALL_TIMES,
        stream: DrawStream | None = None,
        on_use: Callable[["SeparateDraws"], None] | None = None,
    ) -> None:
        schedule = NoiseSchedule.rectified_flow(NUM_BINS) if schedule is None else schedule
        built = build_policy(policy, schedule, prediction_type)
        if not built.is_relative and window != ALL_TIMES:
            policy = windowed(policy, window)
            built = build_policy(policy, schedule, prediction_type)
        super().__init__(built, stream, moves_boundary=moves_with_shift(policy))
        if without_loss:
            refuse_without_loss(built, without_loss)
        warn_if_slow(built, prediction_type, policy)
        self._waiting: WaitingDraws[TimestepDraw] = WaitingDraws()
        self._last = LastDraw()
        self._needs_loss = built.learns or not is_constant(built.weight)
        self._num_unweighed = self._num_unseen = 0
        self._sees_later = sees_later
        self._on_use = on_use
        self._is_used = False

    def times(
        self, hosts_draw: Callable[[], Tensor], data: Tensor | None = None, clock: HostsTime = OUR_TIME
    ) -> Tensor:
        """The t (B,) at which a batch is noised and trained, in the host's dtype and on its device.

        Each call with gradients is one step of a curriculum. Without gradients the t are the host's own.

        Args:
            hosts_draw: returns what the host would draw, (B,), i.i.d. from call to call.
            data: of the batch, as the model sees them before noise, (B, ...). The policy observes them.
            clock: how the host counts its time.

        Raises:
            ValueError: it runs in a checkpoint; the policy needs the data, and they are None; or the policy
                weighs, and no loss came to `weigh` for many draws.
        """
        refuse_checkpoint()
        drawn = hosts_draw()
        if not torch.is_grad_enabled():
            self._last.drawn_by_host()
            return drawn
        if self._needs_loss and self._num_unweighed == MAX_WAITING:
            raise ValueError(
                f"{MAX_WAITING} draws passed, and none of their losses came to {self.policy.name!r}, which"
                " weighs or learns from them: the host makes its loss in another place than this version of"
                " the plugin knows"
            )
        if not self._is_used and self._on_use is not None:
            self._on_use(self)
        self._is_used = True
        t = self.draw_from(hosts_draw, clock, t=drawn, data=data)
        draw, self._draw = self._draw, None
        assert draw is not None
        self._waiting.add(t, draw)
        self._last.drawn()
        self._num_unweighed += 1
        return t

    def begin_step(self, data: Tensor | None) -> None:
        """Begins a training step of the policy, which sees the batch's data first, or later."""
        if not self._sees_later:
            super().begin_step(data)
            return
        if self.policy.needs_data and self._num_unseen == _MAX_UNSEEN:
            refuse_missing_data(self.policy, f"{_MAX_UNSEEN} draws passed, and the host showed none")
        self._num_unseen += 1
        self.policy.advance()

    def see(self, data: Tensor) -> None:
        """Shows the policy the data (B, ...) of the last draw, once; without gradients it sees none."""
        if torch.is_grad_enabled() and self._num_unseen:
            self._num_unseen = 0
            observe(self.policy, data)

    def weigh(self, loss: Tensor, t: Tensor | None = None) -> Tensor:
        """A host's loss (B, ...), not yet reduced, times the weights of its draw. Its gradients go through.

        Without gradients it comes back as it is. The policy learns from each sample's mean.

        Args:
            loss: of each sample or each value of it, after the host's own masks.
            t: (B,) as `times` returned it; None is the newest draw.

        Raises:
            ValueError: there was no draw with gradients, or one for another number of samples.
        """
        refuse_checkpoint()
        if not torch.is_grad_enabled():
            return loss
        is_plain = is_one(self.policy.weight)
        draw = self._of_loss(len(loss) if loss.dim() else 0, t)
        per_sample = loss.detach().flatten(1).mean(1) if loss.dim() > 1 else loss.detach()
        self.policy.update(draw.index.to(loss.device), per_sample)
        # Then the host's own loss is the same to the bit.
        return loss if is_plain else scaled(loss, draw.weight.to(loss.device))

    def weighed_error(
        self, prediction: Tensor, target: Tensor, t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Prediction and target (B, ...) for a host that takes the mean or sum of their squared error itself.

        That is then the host's own, with the weights of the draw. Not for other losses, such as Huber's.

        Args:
            prediction, target: of the model, of one shape.
            t: see `weigh`.

        Raises:
            ValueError: see `weigh`; or the shapes differ.

        Example:
            >>> draws = SeparateDraws("logit_normal")
            >>> t = draws.times(lambda: torch.rand(2))
            >>> pair = draws.weighed_error(torch.ones(2, 3), torch.zeros(2, 3))
            >>> torch.nn.functional.mse_loss(*pair)
            tensor(1.)
        """
        refuse_checkpoint()
        if not torch.is_grad_enabled():
            return prediction, target
        if prediction.shape != target.shape:
            shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
            raise ValueError(f"a squared error needs a prediction and a target of one shape, got {shapes}")
        is_plain = is_one(self.policy.weight)
        draw = self._of_loss(len(prediction), t)
        if is_plain and not self.policy.learns:
            return prediction, target
        wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        error = prediction.to(wide) - target.to(wide)
        if self.policy.learns:
            per_sample = (error.detach() ** 2).flatten(1).mean(1)
            self.policy.update(draw.index.to(error.device), per_sample)
        if is_plain:
            return prediction, target
        # The square of this is weight * error^2, without the rounding of a product for each of the two.
        return scaled(error, draw.weight.to(error.device, wide).sqrt()), torch.zeros_like(error)

    def weights(self, num_samples: int, t: Tensor | None = None, *, learns_by_teach: bool = False) -> Tensor:
        """The weights float32 (B,) of a draw, for a host that multiplies its loss itself; see `weigh`.

        Args:
            num_samples: B.
            t: see `weigh`.
            learns_by_teach: whether the losses of this draw come to `teach`.

        Raises:
            ValueError: see `weigh`; or the policy learns, and would not see the loss.
        """
        if self.policy.learns and not learns_by_teach:
            raise ValueError(
                f"{self.policy.name!r} learns from the loss of each sample, which this host does not show:"
                " take a policy that does not learn"
            )
        return self._of_loss(num_samples, t).weight

    def teach(self, loss: Tensor) -> None:
        """Teaches a learning policy the losses (B,) of the newest draw, which another place weighs."""
        self.policy.update(self._of_loss(len(loss), None).index.to(loss.device), loss.detach())

    def _of_loss(self, num_samples: int, t: Tensor | None) -> TimestepDraw:
        if not self._is_used:
            raise ValueError("the host makes a loss, and no times were drawn for it with gradients before")
        self._last.used()
        self._num_unweighed = 0
        draw = self._waiting.of_loss(t)
        if len(draw.index) != num_samples:
            raise ValueError(
                f"the host's loss has {num_samples or 'no'} samples, and {len(draw.index)} times were drawn"
                " for it: neither a loss that is reduced already nor a part of a batch can be weighed"
            )
        return draw


def refuse_without_loss(policy: TimestepPolicy, why: str) -> None:
    """Raises ValueError if a policy weighs or learns, for a host that shows no loss of each sample.

    Args:
        policy: that would draw alone.
        why: the middle of the message: what the host does.
    """
    if policy.learns or not is_constant(policy.weight):
        raise ValueError(
            f"{policy.name!r} {'learns from' if policy.learns else 'weighs'} the loss of each sample, and"
            f" {why}: take a policy that only draws, such as 'logit_normal', or add weighting='constant'"
        )
