"""Seam B for losses with an `interpolant` (REPA, REG, REPA-E): draw, noise and loss are in one call.

The host draws t, noises the data by `interpolant(t)`, asks the model and returns the denoising loss (B,)
beside its other losses. t = 0 is clean. In REPA and REG the object is a `SILoss`; in REPA-E it is the model,
whose `forward` makes the loss. `InterpolantCall` puts our t into one such call.

Dims: T timesteps, B batch.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import attach, attachment_of, hosts_method, under_way
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.draws.waiting_draws import are_equal
from speedit_plugins.hosts.flow import FlowAttachment
from speedit_plugins.hosts.objects.flow_policy import FlowTraits, flow_policy
from speedit_plugins.hosts.objects.interpolant_call import (
    LOSS,
    MODEL,
    Form,
    InterpolantCall,
    form_of,
    form_of_class,
)
from speedit_plugins.hosts.schedules import binned
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.policies.shifted_boundary import moves_with_shift
from speedit_plugins.registry import Config

# What the model predicts, by the host's names for its path. On the cosine path the velocity is v times pi/2.
_VELOCITY = {"linear": "flow", "cosine": "v"}
_LOSS = "denoising_loss"
# The default of REPA-E's scripts.
_DEFAULT_PATH = "linear"


def fits(host: Any) -> bool:
    """Whether an object has `interpolant(t)`, and a training call of REPA, REG or REPA-E."""
    return form_of(host) is not None


def wrapped(
    host: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None, stream: DrawStream
) -> Any:
    """The host's object with a policy; see `with_policy`."""
    source: TimestepPolicy | _Later
    if form_of(host) is LOSS or isinstance(policy, TimestepPolicy):
        source = policy_for(host, policy, prediction_type)
    else:
        # REPA-E names its path in each call. Built for one of them now, so that a bad policy raises here.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = flow_policy(_traits(host, _DEFAULT_PATH), policy, prediction_type)
        InterpolantAttachment(built, stream)
        source = _Later(host, policy, prediction_type)
    return attach_later(host, source, stream, moves_boundary=moves_with_shift(policy))


def attach_later(
    host: Any,
    source: TimestepPolicy | Callable[[], TimestepPolicy],
    stream: DrawStream,
    *,
    moves_boundary: bool = False,
) -> Any:
    """Lets a policy, or one that is built when it first draws, draw and weigh. Returns the same object.

    Raises:
        ValueError: the object has a policy already, or accelerate has wrapped its `forward`.
    """
    if "forward" in vars(host):
        raise ValueError(
            f"this {type(host).__name__} has a forward of its own, which would go past the policy: call"
            " with_policy before accelerator.prepare"
        )
    return attach(host, InterpolantAttachment(source, stream, moves_boundary=moves_boundary), methods)


def policy_for(
    host: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy for the noise levels of the object; see `flow_policy`.

    Args:
        host: a `SILoss`; or REPA-E's model. Its training calls name its path; before the first it is linear.
        policy: name, config, or a built policy.
        prediction_type: what the model predicts; None asks the host.

    Raises:
        ValueError: see `flow_policy`; or the host has another path than linear or cosine, and does not say
            what its model predicts.

    Warns:
        UserWarning: see `flow_policy`.
    """
    if form_of(host) is LOSS:
        path, law = host.path_type, getattr(host, "weighting", "uniform")
    elif isinstance(policy, TimestepPolicy):
        path, law = _DEFAULT_PATH, "uniform"
    else:
        attachment: InterpolantAttachment = attachment_of(host)
        options = {} if attachment.call is None else attachment.call.options
        path, law = options.get("path_type", _DEFAULT_PATH), options.get("weighting", "uniform")
        attachment.path = path
    return flow_policy(_traits(host, path, law), policy, prediction_type)


@dataclass(frozen=True)
class _Later:
    """Builds a policy in the first training call."""

    host: Any
    policy: str | Config
    prediction_type: str | None

    def __call__(self) -> TimestepPolicy:
        return policy_for(self.host, self.policy, self.prediction_type)


class InterpolantAttachment(FlowAttachment):
    """A `FlowAttachment` that keeps the last t without a loss: REPA-E trains VAE and model at one t."""

    # What REPA-E's policy is built for; None if the object has one path.
    path: str | None = None
    # A t (B, ...) and its draw (B,), of a call that made no denoising loss.
    without_loss: tuple[Tensor, TimestepDraw] | None = None

    def draw_of(self, t: Tensor | None) -> TimestepDraw | None:
        """The draw (B,) for a t (B, ...) that the host gives; None if the host chose it, or gives none.

        Raises:
            ValueError: a draw waits for its loss, and this is another t.
        """
        if t is None or self.without_loss is None:
            return None
        if not are_equal(self.without_loss[0], t):
            raise ValueError(
                "time_input is not the t that the policy drew in the call before, which made no loss: pass"
                " the one that it returned"
            )
        return self.without_loss[1]


def methods(host_class: Any) -> Mapping[str, Callable[..., Any]]:
    """`interpolant` and the training call of a class, at the t of a policy and with weights in its loss.

    Without gradients, and at a t that the host chose itself, they are the host's own.
    """
    form = form_of_class(host_class)
    if form is None:
        raise ValueError(f"{host_class.__name__} has no interpolant, or no training call of REPA or REPA-E")
    theirs = getattr(host_class, form.method)
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, methods, form.method)
        if not is_training():
            return own(*args, **kwargs)
        return _trained(self, host_class, form, signature.bind(self, *args, **kwargs))

    def interpolant(self: Any, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        attachment: InterpolantAttachment = attachment_of(self)
        if attachment.call is not None and attachment.call.t is None:
            attachment.call.fill(attachment, t)
        return hosts_method(self, host_class, methods, "interpolant")(t, *args, **kwargs)

    if form is LOSS:
        return {form.method: train, "interpolant": interpolant}
    # If REPA-E compiles its model, its own forward is compiled, and these two run as they are.
    uncompiled: Any = torch.compiler.disable
    return {form.method: uncompiled(train, recursive=False), "interpolant": uncompiled(interpolant)}


def _trained(host: Any, host_class: type, form: Form, bound: inspect.BoundArguments) -> Any:
    """What a training call returns, at our t and with weights in its denoising loss."""
    own = hosts_method(host, host_class, methods, form.method)
    attachment: InterpolantAttachment = attachment_of(host)
    given = bound.arguments.get("time_input")
    draw = attachment.draw_of(given)
    if given is not None and draw is None:
        return own(*bound.args[1:], **bound.kwargs)
    call = InterpolantCall(host, host_class, form, bound)
    if attachment.path is not None and call.options["path_type"] != attachment.path:
        got = call.options["path_type"]
        raise ValueError(f"the policy is built for the path {attachment.path!r}, got path_type={got!r}")
    with under_way(attachment, call):
        returned, drawn = attachment.drawn_in(lambda: call.run(own))
    draw = drawn if draw is None else draw
    if draw is None:
        raise ValueError(
            f"{host_class.__name__}.{form.method} did not call interpolant(t), so its t is not ours; known to"
            " work: REPA 67f7145, REG 021ea2e, REPA-E 3ad8046"
        )
    if isinstance(returned, Mapping) and returned.get(_LOSS, draw) is None and call.t is not None:
        attachment.without_loss = (call.t, draw)
        return returned
    return _weighted(attachment, returned, draw, has_class_loss=call.has_class_loss)


def _weighted(
    attachment: InterpolantAttachment, returned: Any, draw: TimestepDraw, *, has_class_loss: bool
) -> Any:
    """What a training call returned, with weights in its denoising loss (B,). Other losses stay.

    REG's class token is noised at the same t as the image. So its loss, which comes last, has the same
    weights, and the ratio of the two is the host's at every t.
    """
    if isinstance(returned, Mapping) and _LOSS in returned:
        return {**returned, _LOSS: attachment.weighted_whole(returned[_LOSS], draw)}
    losses = returned if isinstance(returned, tuple) else (returned,)
    for loss in (losses[0], losses[-1]) if has_class_loss else losses[:1]:
        if not isinstance(loss, Tensor) or loss.shape != draw.index.shape:
            raise ValueError(
                f"the host's loss returns {type(returned).__name__}, wanted a dict with {_LOSS}, or first the"
                f" denoising loss {tuple(draw.index.shape)} of each sample (REG: and last its class token's)"
            )
    weighted = [attachment.weighted_whole(losses[0], draw), *losses[1:]]
    if has_class_loss:
        weighted[-1] = draw.weight.to(weighted[-1].dtype) * weighted[-1]
    return tuple(weighted) if isinstance(returned, tuple) else weighted[0]


def _traits(host: Any, path: str, law: str = "uniform") -> FlowTraits:
    """What a policy has to know of an object that takes this path, and draws by this law of its own."""
    # The host's own function: that of an object with a policy would draw.
    own = getattr(type(host), "host_class", type(host)).interpolant
    options = {"path_type": path} if form_of(host) is MODEL else {}

    def levels(time: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, *_ = own(host, time, **options)
        return alpha, sigma

    def predicted(_: Any) -> str:
        if path not in _VELOCITY:
            raise ValueError(
                f"this {type(host).__name__} predicts the velocity on the path {path!r}, where no closed form"
                " relates it to the noise: pass prediction_type (the launcher: --prediction-type), or take"
                f" the path {' or '.join(_VELOCITY)}"
            )
        return _VELOCITY[path]

    laws = () if law == "uniform" else (f"{law} draw (weighting)",)
    return FlowTraits(host, lambda: binned(levels), predicted, laws)
