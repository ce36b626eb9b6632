"""How a host's object gets a policy: it changes its class, not its contents.

The new class is a subclass of the host's own, made once per class, with the seam's methods in place of the
host's. Everything else is the host's, `isinstance` holds, and sampling is untouched.

Dims: T timesteps, B batch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

# From a host's class, the methods that take the place of its own. A function of a module, so that an attached
# object can be pickled by its name.
Methods = Callable[[type], Mapping[str, Any]]

_ATTRIBUTE = "_speedit_attachment"


def attach(host: Any, attachment: Any, methods: Methods) -> Any:
    """Lets an attachment draw and weigh for a host's object; returns the same object.

    Args:
        attachment: an `Attachment`, or what the seam's methods want in its place.

    Raises:
        ValueError: the object has a policy already.
    """
    refuse_attached(host)
    setattr(host, _ATTRIBUTE, attachment)
    host_class: type = type(host)
    host.__class__ = attached_class(host_class, methods)
    return host


def attachment_of(host: Any) -> Any:
    """What was attached to an object that has a policy."""
    return getattr(host, _ATTRIBUTE)


def without_policy(host: Any) -> Any:
    """Gives the host its object back as it was; returns it.

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
    """Raises ValueError where an object has a policy already."""
    if is_attached(host):
        raise ValueError(
            f"{type(host).__name__} has a policy already, by a line of yours or by the launcher:"
            " speedit_plugins.without_policy removes it"
        )


def is_constant(weight: Tensor) -> bool:
    """Whether a weight table (T,) weighs every timestep alike."""
    return bool((weight == weight[0]).all())


def refuse_double_weights(policy: TimestepPolicy, weighing: str, remedy: str) -> None:
    """Raises ValueError where a policy with weights meets a host that weighs its loss already.

    Args:
        weighing: begins the message: who weighs, by what.
        remedy: how to switch it off.
    """
    if not is_constant(policy.weight):
        raise ValueError(
            f"{weighing} already, and the weights of {policy.name!r} would multiply on top: {remedy}, or take"
            " a policy that only draws, such as 'logit_normal' or dict(density=..., weighting='constant')"
        )


def draws_pairs(policy: TimestepPolicy) -> bool:
    """Whether the timesteps of one batch depend on each other: then their law depends on the batch size."""
    return not torch.equal(policy.density_for(1), policy.density)


class Attachment:
    """What is added to an object: a policy, and the bookkeeping of its calls.

    Args:
        policy: draws and weights; or what builds it, called at the first use.
        generator: of the draws; None is the device's global one.
    """

    def __init__(
        self, policy: TimestepPolicy | Callable[[], TimestepPolicy], generator: torch.Generator | None = None
    ) -> None:
        self._source = policy
        self.generator = generator
        self.num_calls = 0
        # Whether the host's loss is mse + vb to the bit; None before the first call.
        self.is_sum: bool | None = None

    @property
    def policy(self) -> TimestepPolicy:
        """Draws and weights."""
        if not isinstance(self._source, TimestepPolicy):
            self._source = self._source()
        return self._source

    @property
    def is_built(self) -> bool:
        """Whether the policy's tables exist."""
        return isinstance(self._source, TimestepPolicy)

    def advance(self) -> None:
        """Counts a training call; each is one step for a curriculum."""
        self.policy.advance(self.num_calls)
        self.num_calls += 1

    def draw(self, t: Tensor) -> TimestepDraw:
        """The draw that takes the place of the host's t (B,), on its device."""
        self.advance()
        return self.policy.draw(len(t), device=t.device, generator=self.generator)

    def weighted(self, terms: Any, draw: TimestepDraw) -> Any:
        """The host's loss terms with the draw's weights in `loss`; all other terms as they are.

        Args:
            terms: dict with per-sample `loss` (B,), `mse` and perhaps `vb`; or the loss (B,) itself.

        Raises:
            ValueError: anything else, a loss of the whole batch, or no mse where the policy weighs it.
        """
        if isinstance(terms, Tensor):
            return self.weighted_whole(terms, draw)
        if not isinstance(terms, Mapping) or "loss" not in terms:
            raise ValueError(
                f"the host's training method returns {type(terms).__name__}, wanted a loss (B,) or a dict"
                " with one: distillation (PixArt's LCM) is not this seam"
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
        weight = draw.weight.to(loss.dtype)
        self.policy.update(draw.index, loss.detach())
        if self.is_sum is None:
            self.is_sum = torch.equal(loss, mse if rest is None else mse + rest)
        if self.is_sum:
            return {**terms, "loss": weight * mse if rest is None else weight * mse + rest}
        # The host adds or scales on its own account: change its loss by what the weight changes of the mse.
        return {**terms, "loss": loss + (weight - 1) * mse}

    def weighted_whole(self, loss: Tensor, draw: TimestepDraw) -> Tensor:
        """A host's loss (B,) of one term times the draw's weights, in its dtype.

        Raises:
            ValueError: a loss of another shape.
        """
        _check_per_sample(loss, draw)
        self.policy.update(draw.index, loss.detach())
        return draw.weight.to(loss.dtype) * loss


def scaled(error: Tensor, weight: Tensor) -> Tensor:
    """An error (B, ...) times a weight (B,) of each sample, in the error's dtype."""
    return weight.to(error.dtype).view(-1, *[1] * (error.dim() - 1)) * error


def _check_per_sample(loss: Tensor, draw: TimestepDraw) -> None:
    if loss.shape != draw.index.shape:
        raise ValueError(
            f"the host's loss has shape {tuple(loss.shape)}, wanted one for each sample,"
            f" {tuple(draw.index.shape)}: a mean over the batch is too late to weigh"
        )


class TableOnDevices:
    """Copies of a table (T,) on the devices that asked for it: one each, which saves a transfer each step.

    Args:
        derive: from the table, what is looked up in its place; a function that can be pickled.
    """

    def __init__(self, derive: Callable[[Tensor], Tensor] = torch.Tensor.float) -> None:
        self._derive = derive
        self._table: Tensor | None = None
        self._copies: dict[torch.device, Tensor] = {}

    def at(self, table: Tensor, index: Tensor) -> Tensor:
        """Values float32 (B,) at indices int64 (B,), on their device; another table drops the copies."""
        if table is not self._table:
            self._table, self._copies = table, {}
        if index.device not in self._copies:
            self._copies[index.device] = self._derive(table).float().to(index.device)
        return self._copies[index.device][index]


@functools.cache
def attached_class(host_class: type, methods: Methods) -> type:
    """The subclass of a host's class that has a seam's methods; the same one for the same arguments."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies by the host's class: the attached one is made anew where it is loaded."""
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
    """The host's own method behind one of a seam's, bound to the object."""
    return cast(Callable[..., Any], getattr(super(attached_class(host_class, methods), host), name))


def _unpickled(host_class: type, methods: Methods) -> Any:
    return object.__new__(attached_class(host_class, methods))
