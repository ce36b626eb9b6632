"""Seam B for flow matching: the host's object draws a continuous t inside `training_losses`.

There are two kinds. A transport (SiT, LightningDiT) has noise at t = 0. A rectified flow (VideoSys, Open-Sora
1.2 and 1.3) shifts its t by the resolution. Both draw as they always do, and their draws are thinned by the
policy's density (`FlowAttachment`).

Dims: T timesteps, B batch.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import (
    attach,
    attachment_of,
    hosts_method,
    refuse_double_weights,
    refuse_given_weights,
)
from speedit_plugins.hosts.draw_stream import DrawStream, draws_pairs
from speedit_plugins.hosts.flow import FlowAttachment
from speedit_plugins.hosts.recomputation import is_training
from speedit_plugins.hosts.schedules import NUM_BINS, binned
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config

# What a transport's model predicts, by the host's names for it and for its path. The score times sigma is
# minus the noise, and the host scales its loss by that; the velocity on a cosine path is v times a constant.
_NOISE = ("NOISE", "SCORE")
_VELOCITY = {"ICPlan": "flow", "GVPCPlan": "v"}
# Open-Sora 1.2 and 1.3 have different names for the model's arguments.
_MODEL_ARGUMENTS = ("model_kwargs", "model_args")


def fits(host: Any) -> bool:
    """Whether a host's object is a transport or a rectified flow."""
    return is_transport(host) or is_rectified_flow(host)


def is_transport(host: Any) -> bool:
    """Whether an object has SiT's `path_sampler`, `sample(x1)` and `training_losses(model, x1, ...)`."""
    return hasattr(host, "path_sampler") and callable(getattr(host, "training_losses", None))


def is_rectified_flow(host: Any) -> bool:
    """Whether an object has a `scheduler` that adds noise by itself, as Open-Sora's RFLOW has."""
    inner = getattr(host, "scheduler", None)
    return (
        hasattr(inner, "add_noise") and hasattr(inner, "training_losses") and hasattr(host, "training_losses")
    )


def wrapped(
    host: Any,
    policy: str | Config | TimestepPolicy,
    prediction_type: str | None,
    stream: DrawStream,
) -> Any:
    """The host's object with a policy; see `with_policy`."""
    return attach_flow(host, FlowAttachment(policy_for(host, policy, prediction_type), stream))


def attach_flow(host: Any, attachment: FlowAttachment) -> Any:
    """Lets an attachment draw and weigh for a transport or a rectified flow. Returns the same object."""
    return attach(host, attachment, transport_methods if is_transport(host) else rectified_flow_methods)


def policy_for(
    host: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy for the noise levels of a flow host, 0 is clean. One that is built already is checked.

    Args:
        host: a transport or a rectified flow.
        policy: name, config, or a built policy.
        prediction_type: what the model predicts; None asks the host.

    Raises:
        ValueError: the policy is bad, draws in pairs or strata, or has weights and so has the host.
    """
    if isinstance(policy, TimestepPolicy):
        built = policy
    else:
        schedule = binned(_levels_of(host)) if is_transport(host) else NoiseSchedule.rectified_flow(NUM_BINS)
        built = _built(policy, schedule, host, prediction_type)
    if draws_pairs(built) or built.stratified:
        how = "strata" if built.stratified else "pairs"
        raise ValueError(
            f"{built.name!r} draws in {how}, and a flow host's own draws are refused one by one: take a"
            " policy with independent draws, such as 'speedit'"
        )
    own_weights = getattr(getattr(host, "loss_type", None), "name", "NONE")
    if is_transport(host) and own_weights != "NONE" and host.model_type.name in _NOISE:
        refuse_double_weights(
            built, f"this {type(host).__name__} weighs its loss by {own_weights.lower()}", "drop loss_weight"
        )
    return built


def _built(
    policy: str | Config, schedule: NoiseSchedule, host: Any, prediction_type: str | None
) -> TimestepPolicy:
    try:
        predicted = prediction_type or flow_prediction_type(host)
    except ValueError:
        # The host does not say. That matters only for weights that are converted to its prediction type.
        first, other = (build_policy(policy, schedule, each) for each in ("epsilon", "v"))
        if torch.equal(first.weight, other.weight):
            return first
        raise
    return build_policy(policy, schedule, predicted)


def flow_prediction_type(host: Any) -> str:
    """What a transport or a rectified flow takes the squared error of: flow, v or epsilon.

    Raises:
        ValueError: a velocity on a path on which no closed form relates it to the noise.
    """
    if not is_transport(host):
        return "flow"
    if host.model_type.name in _NOISE:
        return "epsilon"
    path = type(host.path_sampler).__name__
    if path not in _VELOCITY:
        raise ValueError(
            f"this {type(host).__name__} predicts the velocity on the path {path}, where no closed form"
            " relates it to the noise: pass prediction_type (the launcher: --prediction-type), or take the"
            " Linear or the GVP path"
        )
    return _VELOCITY[path]


def draw_hosts_t(scheduler: Any, x_start: Tensor, model_arguments: Any) -> Tensor:
    """The t (B,) that a host's rectified flow would train at, drawn and shifted as it does.

    Raises:
        ValueError: the host does not pass its t to `add_noise`.
    """
    # The host draws within training_losses, and add_noise is the first to get the shifted t. A shallow copy
    # stops there, before the model, and leaves the host's object as it is.
    stopping = copy.copy(scheduler)
    stopping.add_noise = _stop
    rows = torch.empty(len(x_start), 1, device=x_start.device)
    try:
        stopping.training_losses(None, rows, model_arguments, noise=rows)
    except _DrawnTimestep as drawn:
        return drawn.t
    raise ValueError(
        "the host's rectified flow did not pass its t to add_noise; known to work: Open-Sora 1.2.0, 1.3,"
        " VideoSys 2.0"
    )


def checked(t: Tensor) -> Tensor:
    """What a rectified flow has drawn (B,).

    Warns:
        UserWarning: all of it is 0, once: Open-Sora's timestep transform rounds few frames down to none.
    """
    if t.is_floating_point() and not t.any():
        warnings.warn(
            "the host's rectified flow draws t = 0 alone, which is data without noise: its timestep transform"
            " does so for 2 to 16 frames (Open-Sora, issue 601); train on 17 or more, on 1, or without"
            " use_timestep_transform",
            stacklevel=4,
        )
    return t


def model_arguments_of(arguments: Mapping[str, Any]) -> Any:
    """The model's arguments among those of a rectified flow's `training_losses`, or None."""
    return next((arguments[name] for name in _MODEL_ARGUMENTS if name in arguments), None)


def rectified_flow_methods(host_class: type) -> Mapping[str, Callable[..., Any]]:
    """`training_losses` of a rectified flow, at thinned draws. A t that is passed is kept."""
    signature = _signature(host_class, "training_losses")

    def training_losses(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        own = hosts_method(self, host_class, rectified_flow_methods, "training_losses")
        given = bound.arguments
        refuse_given_weights(given)
        # An evaluation is the host's own.
        if given.get("t") is not None or not is_training():
            return own(*args, **kwargs)
        attachment, num_timesteps = attachment_of(self), self.num_timesteps

        def time_of(t: Tensor) -> Tensor:
            # A discrete t is a row of the host's table; this is its middle.
            time: Tensor = (t if t.is_floating_point() else t + 0.5) / num_timesteps
            return time

        def trained() -> Any:
            x_start = given["x_start"]

            def hosts_draw() -> Tensor:
                return draw_hosts_t(self.scheduler, x_start, model_arguments_of(given))

            # The host's own draw is dropped. After it, its noise is what it would be without a policy.
            given["t"] = attachment.draw_from(hosts_draw, time_of, t=checked(hosts_draw()), data=x_start)
            return own(*bound.args[1:], **bound.kwargs)

        return attachment.weighted_call(trained)

    return {"training_losses": training_losses}


def transport_methods(host_class: type) -> Mapping[str, Callable[..., Any]]:
    """`sample` and `training_losses` of a transport, at thinned draws.

    Without gradients, and when LightningDiT validates on an interval, draw and loss stay the host's.
    """
    sample_signature = _signature(host_class, "sample")
    loss_signature = _signature(host_class, "training_losses")

    def sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, transport_methods, "sample")
        drawn, bound = own(*args, **kwargs), sample_signature.bind(self, *args, **kwargs)
        if bound.arguments.get("sp_timesteps") is not None or not is_training():
            return drawn
        # The host has drawn its t with the noise. We draw again for rows of one pixel: the noise stays.
        x1: Tensor = bound.arguments["x1"]
        bound.arguments["x1"] = x1.new_empty(len(x1), 1)

        def hosts_draw() -> Tensor:
            t: Tensor = own(*bound.args[1:], **bound.kwargs)[0]
            return t

        attachment: FlowAttachment = attachment_of(self)
        t = attachment.draw_from(hosts_draw, lambda t: 1 - t, t=drawn[0], data=x1)
        return (t, *drawn[1:])

    def training_losses(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, transport_methods, "training_losses")
        is_given = loss_signature.bind(self, *args, **kwargs).arguments.get("sp_timesteps") is not None
        if is_given or not is_training():
            return own(*args, **kwargs)
        return attachment_of(self).weighted_call(lambda: own(*args, **kwargs))

    return {"sample": sample, "training_losses": training_losses}


def _signature(host_class: type, method: str) -> inspect.Signature:
    return inspect.signature(getattr(host_class, method))


def _levels_of(host: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """A function from our time to a transport's scales of signal and noise."""
    path = host.path_sampler

    def levels(time: Tensor) -> tuple[Tensor, Tensor]:
        # A transport has noise at 0.
        return path.compute_alpha_t(1 - time)[0], path.compute_sigma_t(1 - time)[0]

    return levels


class _DrawnTimestep(Exception):  # noqa: N818 - it carries a value out of the host and is no error
    def __init__(self, t: Tensor) -> None:
        super().__init__("the host has drawn its t")
        self.t = t


def _stop(original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    raise _DrawnTimestep(timesteps)
