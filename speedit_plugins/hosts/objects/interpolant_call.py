"""One training call of a loss with an `interpolant`: how the policy's t gets into it, and the model sees it.

The host draws t, and `interpolant(t)` is the first to get it. There ours is written into the host's tensor,
so that every later use has it.

Dims: B batch.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.hosts.draws.waiting_draws import are_equal
from speedit_plugins.hosts.flow import FlowAttachment, HostsTime


@dataclass(frozen=True)
class Form:
    """A kind of training call.

    Args:
        method: its name.
        data: the argument for the data (B, ...).
        others: further arguments by which it is known.
    """

    method: str
    data: str
    others: tuple[str, ...]


# REPA and REG have a loss; REPA-E has a model that makes its loss.
LOSS = Form("__call__", "images", ("model",))
MODEL = Form("forward", "x", ("loss_kwargs", "time_input"))


def form_of(host: Any) -> Form | None:
    """The kind of training call of an object; None if it has none, or no `interpolant`."""
    return form_of_class(type(host))  # type: ignore[arg-type]  # mypy: a class has a hash


@functools.cache
def form_of_class(host_class: type) -> Form | None:
    """The same for the object's class."""
    if not callable(getattr(host_class, "interpolant", None)):
        return None
    for form in (LOSS, MODEL):
        method = getattr(host_class, form.method, None)
        names = inspect.signature(method).parameters if callable(method) else {}
        if {form.data, *form.others} <= set(names):
            return form
    return None


@dataclass(eq=False)
class InterpolantCall:
    """A training call of an object that has a policy.

    Args:
        host: the object.
        host_class: the host's own class of it.
        form: of the call.
        bound: its arguments, with the object as the first.
    """

    host: Any
    host_class: type
    form: Form
    bound: inspect.BoundArguments

    def __post_init__(self) -> None:
        # The host's tensor with our t, once it is drawn; or the t that the host was given.
        self.t: Tensor | None = self.bound.arguments.get("time_input")
        self._version = -1
        # What was drawn, (B,).
        self._drawn: Tensor | None = None
        if self.form is LOSS:
            self.bound.arguments["model"] = _Watched(self.bound.arguments["model"], self)

    @property
    def options(self) -> Any:
        """What has the host's `path_type` and `weighting`: the object, or a mapping."""
        return self.host if self.form is LOSS else self.bound.arguments["loss_kwargs"]

    @property
    def has_class_loss(self) -> bool:
        """Whether a class token is trained too, as in REG."""
        return self.bound.arguments.get("cls_token") is not None

    def run(self, own: Callable[..., Any]) -> Any:
        """What the host's own method returns, at our t once `fill` is called."""
        return own(*self.bound.args[1:], **self.bound.kwargs)

    def fill(self, attachment: FlowAttachment, t: Tensor) -> None:
        """Writes the policy's t into the host's, (B, 1, ...)."""
        x: Tensor = self.bound.arguments[self.form.data]
        clock = HostsTime(lambda t: t, lambda draw, t: draw.time.to(t))
        own = t.flatten().clone()
        drawn = attachment.draw_from(
            self._hosts_draw, clock, t=own, data=x, observed=_as_the_model_sees(self.host, x)
        )
        t.copy_(drawn.view_as(t))
        self.t, self._version, self._drawn = t, t._version, drawn

    def see(self, t: Any) -> None:
        """Notes a t (B,) that goes to the model. Raises ValueError unless it is the one of this call."""
        # If it is the same memory and nobody wrote to it since, the CPU need not wait for the device.
        ours, is_same = self.t, False
        if ours is not None and isinstance(t, Tensor):
            place = (ours.data_ptr(), self._version, ours.dtype)
            is_same = (t.data_ptr(), t._version, t.dtype) == place or are_equal(self._drawn, t)
        if not is_same:
            raise ValueError(
                "the model gets another t than the policy drew: this loss changes its t after interpolant(t);"
                " known to work: SILoss of REPA and REG"
            )

    def _hosts_draw(self) -> Tensor:
        """Another t (B,), drawn as the host does."""
        name, arguments = self.form.data, self.bound.arguments
        x: Tensor = arguments[name]
        # Rows of one pixel, so that little noise is drawn beside t.
        rows = {name: x.new_empty(len(x), *[1] * (x.dim() - 1))}
        given = {key: rows.get(key, value) for key, value in arguments.items()}
        given[next(iter(given))] = _stopping(self.host, self.host_class)
        bound = inspect.BoundArguments(self.bound.signature, given)
        try:
            getattr(self.host_class, self.form.method)(*bound.args, **bound.kwargs)
        except _DrawnTimestep as drawn:
            return drawn.t.flatten()
        raise ValueError(f"{self.host_class.__name__}.{self.form.method} did not pass its t to interpolant")


class _Watched:
    """The host's model. It reports the t of every call."""

    def __init__(self, model: Any, call: InterpolantCall) -> None:
        self._model, self._call = model, call

    def __call__(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Any:
        self._call.see(t)
        return self._model(x, t, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _DrawnTimestep(Exception):  # noqa: N818 - it carries a value out of the host and is no error
    def __init__(self, t: Tensor) -> None:
        super().__init__("the host has drawn its t")
        self.t = t


def _stop(t: Tensor, *_: Any, **__: Any) -> None:
    raise _DrawnTimestep(t)


def _stopping(host: Any, host_class: Any) -> Any:
    """A shallow copy of the host's object that stops when it has drawn its t, and changes no layer."""
    stopping: Any = object.__new__(host_class)
    vars(stopping).update(vars(host), interpolant=_stop)
    if isinstance(host, nn.Module):
        # REPA-E's batch norm would count these rows.
        vars(stopping)["_modules"] = dict.fromkeys(host._modules, nn.Identity())
    return stopping


def _as_the_model_sees(host: Any, x: Tensor) -> Tensor:
    """Data (B, ...) as they are noised: REPA-E's model normalises them first, without learned scales."""
    norm = getattr(host, "bn", None)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return x
    with torch.no_grad():
        if norm.training:
            # Its running statistics count the batch once, in the host's own call.
            return functional.batch_norm(x, None, None, training=True, eps=norm.eps)
        normalised: Tensor = norm(x)
        return normalised
