"""How a host's object gets a policy: its class changes, its contents stay.

A host is a training framework of somebody else. A seam is the place in a host's code where it draws t and
makes its loss, and so the place where a policy goes in.

The object's new class is a subclass of the host's own. It is made once per class, and it replaces the methods
of the seam. Everything else is the host's: `isinstance` holds, and sampling is untouched.

Dims: T timesteps, B batch, F frames.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.observation import observe
from speedit_plugins.hosts.draws.recomputation import RecentCalls, is_recomputing
from speedit_plugins.hosts.draws.weighted_loss import draw_for_loss, is_constant, is_shared, weighted_mse
from speedit_plugins.hosts.states.booster_checkpoints import booster_states, keep_in_boosters
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

# Makes the methods that replace those of a host's class. It is a function of a module, since an object with a
# policy is pickled by its name.
Methods = Callable[[type], Mapping[str, Any]]

Call = TypeVar("Call")

_ATTRIBUTE = "_speedit_attachment"


def attach(host: Any, attachment: Any, methods: Methods) -> Any:
    """Lets an attachment draw and weigh for a host's object. Returns the same object.

    Args:
        host: the object.
        attachment: an `Attachment`, or what else the methods of the seam expect.
        methods: of the seam.

    Raises:
        ValueError: the object has a policy already.
    """
    refuse_attached(host)
    setattr(host, _ATTRIBUTE, attachment)
    host_class: type = type(host)
    host.__class__ = attached_class(host_class, methods)
    return host


def attachment_of(host: Any) -> Any:
    """The attachment of an object that has a policy."""
    return getattr(host, _ATTRIBUTE)


def without_policy(host: Any) -> Any:
    """Takes the policy out of a host's object. Returns the same object, with the class that it had.

    Raises:
        ValueError: the object has no policy.
    """
    if not is_attached(host):
        raise ValueError(f"{type(host).__name__} has no policy to remove")
    host.__class__ = type(host).host_class
    delattr(host, _ATTRIBUTE)
    return host


def is_attached(host: Any) -> bool:
    """Whether this object has a policy."""
    return hasattr(type(host), "host_class") and hasattr(host, _ATTRIBUTE)


def refuse_attached(host: Any) -> None:
    """Raises ValueError if an object has a policy already."""
    if is_attached(host):
        raise ValueError(
            f"{type(host).__name__} has a policy already, from a line of yours or from the launcher:"
            " speedit_plugins.without_policy removes it"
        )


def refuse_double_weights(policy: TimestepPolicy, weighing: str, remedy: str) -> None:
    """Raises ValueError if the policy has weights, for a host that weighs its loss already.

    Args:
        policy: of the object.
        weighing: the beginning of the message: who weighs, and by what.
        remedy: how to switch the host's weights off.
    """
    if not is_constant(policy.weight):
        raise ValueError(
            f"{weighing} already, and the weights of {policy.name!r} would be multiplied on top: {remedy}, or"
            " take a policy that only draws, such as 'logit_normal' or"
            " dict(density=..., weighting='constant')"
        )


def refuse_given_weights(
    arguments: Mapping[str, Any], ours: str = "the policy weighs already", remedy: str = "drop one of them"
) -> None:
    """Raises ValueError if a training call is given `weights`, which multiply beside ours.

    Args:
        arguments: of the call.
        ours: what weighs already.
        remedy: what to do.
    """
    if arguments.get("weights") is not None:
        raise ValueError(f"training_losses got weights, and {ours}: {remedy}")


class PolicyHolder:
    """Has a `policy`, and keeps its state by `state_dict` and `load_state_dict`."""


class Attachment(PolicyHolder):
    """What is added to an object: the policy, and the random numbers of its draws.

    Args:
        policy: draws and weighs; or a function that builds it, called at the first use.
        stream: of random numbers; None is one for each data-parallel rank, see `DrawStream`.
    """

    def __init__(
        self, policy: TimestepPolicy | Callable[[], TimestepPolicy], stream: DrawStream | None = None
    ) -> None:
        # A host may load its checkpoint before it trains.
        booster_states()
        self._source = policy
        self.stream = stream if stream is not None else DrawStream()
        self._waiting_state: Mapping[str, Any] | None = None
        self._weight = TableOnDevices()
        self._recent = RecentCalls()
        # What a seam keeps while a training call runs; see `under_way`.
        self.call: Any = None
        if self.is_built:
            self.check(self.policy)

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs; built now if it is not yet."""
        if not isinstance(self._source, TimestepPolicy):
            built = self._source()
            self.check(built)
            if self._waiting_state is not None:
                built.load_state_dict(self._waiting_state)
            self._source = built
        return self._source

    def check(self, policy: TimestepPolicy) -> None:
        """Raises ValueError if this stream cannot draw by a policy."""
        self.stream.check(policy)

    def begin_step(self, data: Tensor | None) -> None:
        """Begins a training step of the policy, which sees the batch's data first."""
        keep_in_boosters(self)
        self.policy.advance()
        observe(self.policy, data)

    @property
    def is_built(self) -> bool:
        """Whether the policy's tables exist."""
        return isinstance(self._source, TimestepPolicy)

    @property
    def num_calls(self) -> int:
        """The number of training calls, of all objects with this policy."""
        return self.policy.num_steps if self.is_built else 0

    def state_dict(self) -> dict[str, Any]:
        """The policy's state; empty if it is not built yet, and none was loaded."""
        return self.policy.state_dict() if self.is_built else dict(self._waiting_state or {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, now or when the policy is built.

        Raises:
            ValueError: the state is of another policy.
        """
        if self.is_built and state:
            self.policy.load_state_dict(state)
        elif state:
            self._waiting_state = state

    def draw(
        self,
        t: Tensor,
        data: Tensor | None = None,
        *,
        observed: Tensor | None = None,
        is_drawn: bool = True,
    ) -> TimestepDraw:
        """The draw that replaces the host's t, in its shape and on its device.

        It is a training step of the policy, unless a checkpoint computes a call again: that call had a draw.

        Args:
            t: (B,); or (B, F) if each frame has a t of its own. Frames with one t get one.
            data: of the batch. With t, they tell which call is computed again.
            observed: the data as the model sees them, which the policy observes; None is `data`.
            is_drawn: whether the host has drawn t; else only its shape and device matter.

        Raises:
            ValueError: t is no tensor, or has no dimension.
        """
        if not isinstance(t, Tensor) or t.dim() == 0:
            got = f"shape {tuple(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise ValueError(
                f"the host's timesteps have to be a tensor (B,), or (B, F) with one for each frame; got {got}"
            )
        if is_recomputing():
            recomputed: TimestepDraw = self._recent.of_recomputed(t if is_drawn else None, data)
            return recomputed
        self.begin_step(data if observed is None else observed)
        per_sample = t.dim() == 1 or is_shared(t)
        flat = self.stream.draw(self.policy, len(t) if per_sample else t.numel(), t.device)
        draw = flat if t.dim() == 1 else _shaped(flat, t.shape)
        self._recent.add(draw, t if is_drawn else None, data)
        return draw

    def at(self, index: Tensor, time: Tensor) -> TimestepDraw:
        """Timesteps that the host chose itself, with the policy's weights (B,).

        Args:
            index: int64 (B,).
            time: float32 (B,).
        """
        weight = self._weight.at(self.policy.weight, index)
        return TimestepDraw(index, time, weight, self.policy.scope)

    def weighted(self, terms: Any, draw: TimestepDraw) -> Any:
        """The host's loss terms with the draw's weights in `loss`. All other terms stay as they are.

        Args:
            terms: a dict with per-sample `loss` (B,), `mse` and perhaps `vb`; or the loss (B,) itself.
            draw: of this step.

        Raises:
            ValueError: the terms are something else, the loss is that of the whole batch, or the policy
                weighs the mse, and there is none or the loss is not made of it.
        """
        if isinstance(terms, Tensor):
            return self.weighted_whole(terms, draw)
        if not isinstance(terms, Mapping) or "loss" not in terms:
            raise ValueError(
                f"the host's training method returns {type(terms).__name__}, wanted a loss (B,) or a dict"
                " with one; distillation (PixArt's LCM) has no such loss"
            )
        if draw.scope == "loss":
            return {**terms, "loss": self.weighted_whole(terms["loss"], draw)}
        if "mse" not in terms:
            raise ValueError(
                f"the host's terms {sorted(terms)} have no mse to weight (a KL loss?);"
                " wanted a policy of scope 'loss'"
            )
        loss, mse, rest = terms["loss"], terms["mse"], terms.get("vb")
        draw = draw_for_loss(draw, loss, self.policy)
        draw_for_loss(draw, mse, self.policy)
        weighted = weighted_mse(loss, mse, rest, draw.weight.to(loss.dtype))
        self.learn(draw, loss)
        return {**terms, "loss": weighted}

    def weighted_whole(self, loss: Tensor, draw: TimestepDraw) -> Tensor:
        """The whole of a host's loss (B,) times the draw's weights, in its dtype.

        Raises:
            ValueError: the loss has another shape.
        """
        draw = draw_for_loss(draw, loss, self.policy)
        self.learn(draw, loss)
        return draw.weight.to(loss.dtype) * loss

    def learn(self, draw: TimestepDraw, loss: Tensor) -> None:
        """Teaches a learning policy the losses of a draw, in its shape: those that the host minimises.

        What a checkpoint computes again is known already.
        """
        if not is_recomputing():
            self.policy.update(draw.index.flatten(), loss.detach().flatten())


class LastDraw:
    """Whether a loss belongs to a draw of the policy, for hosts that draw and make their loss separately."""

    def __init__(self) -> None:
        # Whether the last draw of the policy had a loss.
        self.is_used = True
        self._is_hosts = False
        self.num_used = 0

    def drawn(self) -> None:
        """The policy has drawn. What comes next is its loss, or an evaluation."""
        self.is_used = self._is_hosts = False

    def drawn_by_host(self) -> None:
        """The host has drawn without gradients: for an evaluation, if a draw still waits for its loss."""
        self._is_hosts = self.is_used

    def used(self) -> None:
        """A loss with gradients is made. Raises ValueError if the host drew its timesteps."""
        if self._is_hosts:
            raise ValueError(
                "the timesteps of this loss were drawn under torch.no_grad(), where the policy draws nothing:"
                " draw them with gradients enabled"
            )
        self.is_used = True
        self.num_used += 1


@contextlib.contextmanager
def under_way(attachment: Any, call: Call) -> Iterator[Call]:
    """Keeps `call` as `attachment.call` while a training call runs; afterwards it is None again."""
    attachment.call = call
    try:
        yield call
    finally:
        attachment.call = None


def _shaped(draw: TimestepDraw, shape: torch.Size) -> TimestepDraw:
    """A draw in the shape of the host's t (B, ...): of all its values, or of B samples whose frames share."""
    if len(draw.index) == shape.numel():
        return draw.map(lambda each: each.view(shape))
    column = (-1, *[1] * (len(shape) - 1))
    return draw.map(lambda each: each.view(column).expand(shape))


class TableOnDevices:
    """One copy of a table (T,) on each device that asked for it. This saves a transfer in every step.

    Args:
        derive: turns the table into the one that is looked up; a function that can be pickled.
    """

    def __init__(self, derive: Callable[[Tensor], Tensor] = torch.Tensor.float) -> None:
        self._derive = derive
        self._table: Tensor | None = None
        self._copies: dict[torch.device, Tensor] = {}

    def at(self, table: Tensor, index: Tensor) -> Tensor:
        """Values float32 (B,) at indices int64 (B,), on their device. A new table replaces the copies."""
        if table is not self._table:
            self._table, self._copies = table, {}
        if index.device not in self._copies:
            self._copies[index.device] = self._derive(table).float().to(index.device)
        return self._copies[index.device][index]


@functools.cache
def attached_class(host_class: type, methods: Methods) -> type:
    """The subclass of a host's class with the methods of a seam; one for the same arguments."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies name the host's class. The subclass is made anew where they are loaded."""
        return _unpickled, (host_class, methods), self.__dict__

    members = {
        "host_class": host_class,
        "__module__": host_class.__module__,
        "__doc__": host_class.__doc__,
        "__reduce_ex__": reduce,
        **methods(host_class),
    }
    return type(host_class.__name__, (host_class,), members)


def hosts_method(host: Any, host_class: type, methods: Methods, name: str) -> Callable[..., Any]:
    """The host's own method that a method of the seam replaced, bound to the object."""
    return cast(Callable[..., Any], getattr(super(attached_class(host_class, methods), host), name))


def _unpickled(host_class: type, methods: Methods) -> Any:
    return object.__new__(attached_class(host_class, methods))
