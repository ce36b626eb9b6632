"""How a host's object gets a policy: its class changes, its contents stay.

A host is a training framework of somebody else. A seam is the place in a host's code where it draws t and
makes its loss, and so the place where a policy goes in.

The object's new class is a subclass of the host's own. It is made once per class, and it replaces the methods
of the seam. Everything else is the host's: `isinstance` holds, and sampling is untouched.

Dims: T timesteps, B batch.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

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


def is_constant(weight: Tensor) -> bool:
    """Whether a table (T,) has one value for every timestep."""
    return bool((weight == weight[0]).all())


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


def draws_pairs(policy: TimestepPolicy) -> bool:
    """Whether the timesteps of one batch depend on each other. Their density then depends on B."""
    return not torch.equal(policy.density_for(1), policy.density)


class Attachment:
    """What is added to an object: the policy, and a count of the object's training calls.

    Args:
        policy: draws and weighs; or a function that builds it, called at the first use.
        generator: for the draws; None is the device's global one.
    """

    def __init__(
        self, policy: TimestepPolicy | Callable[[], TimestepPolicy], generator: torch.Generator | None = None
    ) -> None:
        self._source = policy
        self.generator = generator
        self.num_calls = 0
        self._weight = TableOnDevices()
        # What a seam keeps while a training call runs; see `under_way`.
        self.call: Any = None

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs; built now if it is not yet."""
        if not isinstance(self._source, TimestepPolicy):
            self._source = self._source()
        return self._source

    @property
    def is_built(self) -> bool:
        """Whether the policy's tables exist."""
        return isinstance(self._source, TimestepPolicy)

    def advance(self) -> None:
        """Counts a training call. Each call is one step of a curriculum."""
        self.policy.advance(self.num_calls)
        self.num_calls += 1

    def draw(self, t: Tensor) -> TimestepDraw:
        """The draw that replaces the host's t (B,), on its device."""
        self.advance()
        return self.policy.draw(len(t), device=t.device, generator=self.generator)

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
        for term in (loss, mse):
            _check_per_sample(term, draw)
        weighted = _weighted_mse(loss, mse, rest, draw.weight.to(loss.dtype))
        self.policy.update(draw.index, loss.detach())
        return {**terms, "loss": weighted}

    def weighted_whole(self, loss: Tensor, draw: TimestepDraw) -> Tensor:
        """The whole of a host's loss (B,) times the draw's weights, in its dtype.

        Raises:
            ValueError: the loss has another shape.
        """
        _check_per_sample(loss, draw)
        self.policy.update(draw.index, loss.detach())
        return draw.weight.to(loss.dtype) * loss


class LastDraw:
    """Whether a loss belongs to a draw of the policy, for hosts that draw and make their loss separately."""

    def __init__(self) -> None:
        self._is_used = True
        self._is_hosts = False

    def drawn(self) -> None:
        """The policy has drawn. What comes next is its loss, or an evaluation."""
        self._is_used = self._is_hosts = False

    def drawn_by_host(self) -> None:
        """The host has drawn without gradients: for an evaluation, if a draw still waits for its loss."""
        self._is_hosts = self._is_used

    def used(self) -> None:
        """A loss with gradients is made. Raises ValueError if the host drew its timesteps."""
        if self._is_hosts:
            raise ValueError(
                "the timesteps of this loss were drawn under torch.no_grad(), where the policy draws nothing:"
                " draw them with gradients enabled"
            )
        self._is_used = True


@contextlib.contextmanager
def under_way(attachment: Any, call: Call) -> Iterator[Call]:
    """Keeps `call` as `attachment.call` while a training call runs; afterwards it is None again."""
    attachment.call = call
    try:
        yield call
    finally:
        attachment.call = None


def scaled(error: Tensor, weight: Tensor) -> Tensor:
    """Errors (B, ...) times the weight (B,) of each sample, in the dtype of the errors."""
    return weight.to(error.dtype).view(-1, *[1] * (error.dim() - 1)) * error


def _weighted_mse(loss: Tensor, mse: Tensor, rest: Tensor | None, weight: Tensor) -> Tensor:
    """A host's loss (B,) with its share of the mse (B,) times the weight (B,); its other terms stay.

    Args:
        loss: the host's; the mse, times any factor, plus any other terms.
        mse: the term that is weighed.
        rest: the variational term `vb` (B,), if there is one.
        weight: of each sample.

    Raises:
        ValueError: the loss has a gradient, and the mse has no part in it.
    """
    factor = _share(loss, mse)
    with torch.no_grad():
        plain, weighed = (mse, weight * mse) if rest is None else (mse + rest, weight * mse + rest)
        # If the loss is this sum to the bit, it is made again from its terms, since a difference would round
        # a small weight away. This is decided for each sample: the CPU need not wait for the device.
        value = torch.where(loss == factor * plain, factor * weighed, loss + factor * (weight - 1) * mse)
    if not loss.requires_grad:
        return value
    # The gradient goes through the host's own loss, since a term that is 0 now has one too.
    mse.register_hook(lambda gradient: weight.to(gradient.dtype) * gradient)  # type: ignore[no-untyped-call]  # torch's
    return cast(Tensor, _WithValue.apply(loss, value))  # type: ignore[no-untyped-call]  # torch's


class _WithValue(torch.autograd.Function):
    """A value (B,) with the gradient of a host's loss (B,)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _share(loss: Tensor, mse: Tensor) -> Tensor:
    """The derivative (B,) of a loss (B,) by the mse (B,): its factor. 1 if the loss has no gradient."""
    if not loss.requires_grad:
        return torch.ones_like(loss)
    factor = None
    if mse.requires_grad:
        (factor,) = torch.autograd.grad(loss.sum(), mse, retain_graph=True, allow_unused=True)
    if factor is None:
        raise ValueError(
            "the host's loss is not made of the tensor that it reports as mse (a detached copy?), so the mse"
            " in it cannot be weighed; wanted a policy of scope 'loss'"
        )
    return factor.to(loss.dtype)


def _check_per_sample(loss: Tensor, draw: TimestepDraw) -> None:
    if loss.shape != draw.index.shape:
        raise ValueError(
            f"the host's loss has shape {tuple(loss.shape)}, wanted one for each sample,"
            f" {tuple(draw.index.shape)}: the mean of a batch cannot be weighed by sample"
        )


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
