"""Seam B for a rectified flow (VideoSys, Open-Sora 1.2 and 1.3): the training call, at the t of a policy.

Dims: B batch.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import attachment_of, hosts_method, refuse_given_weights
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.flow import FlowAttachment, HostsTime
from speedit_plugins.policies.policy import TimestepDraw

# Open-Sora 1.2 and 1.3 have different names for the model's arguments.
_MODEL_ARGUMENTS = ("model_kwargs", "model_args")


def rectified_flow_methods(host_class: Any) -> Mapping[str, Callable[..., Any]]:
    """`training_losses` of a rectified flow, at the t of a policy."""
    signature = inspect.signature(host_class.training_losses)

    def training_losses(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        own = hosts_method(self, host_class, rectified_flow_methods, "training_losses")
        return rectified_flow_losses(self, bound, own)

    return {"training_losses": training_losses}


def rectified_flow_losses(host: Any, bound: inspect.BoundArguments, own: Callable[..., Any]) -> Any:
    """The loss terms of a rectified flow, at the t of its policy and with its weights.

    Args:
        host: has an attachment.
        bound: the arguments of its training call, with itself as the first.
        own: the host's `training_losses`, without itself.
    """
    given = bound.arguments
    refuse_given_weights(given)
    # An evaluation is the host's own.
    if given.get("t") is not None or not is_training():
        return own(*bound.args[1:], **bound.kwargs)
    attachment: FlowAttachment = attachment_of(host)

    def trained() -> Any:
        x_start, arguments = given["x_start"], model_arguments_of(given)

        def hosts_draw() -> Tensor:
            return draw_hosts_t(host.scheduler, x_start, arguments)

        # The host's own draw is dropped. After it, its noise is what it would be without a policy.
        drawn = hosts_draw()
        if attachment.policy.is_relative:
            checked(drawn)
        clock = clock_of(host, x_start, arguments)
        given["t"] = attachment.draw_from(hosts_draw, clock, t=drawn, data=x_start)
        return own(*bound.args[1:], **bound.kwargs)

    return attachment.weighted_call(trained)


def clock_of(host: Any, x_start: Tensor, model_arguments: Any) -> HostsTime:
    """How a rectified flow counts its time, and by how much it shifts the t of this batch."""
    num_timesteps: int = host.num_timesteps

    def time_of(t: Tensor) -> Tensor:
        # A discrete t is a row of the host's table; this is its middle.
        time: Tensor = (t if t.is_floating_point() else t + 0.5) / num_timesteps
        return time

    def t_of(draw: TimestepDraw, t: Tensor) -> Tensor:
        if t.is_floating_point():
            return (draw.time * num_timesteps).to(t)
        return (draw.time * num_timesteps).to(t).clamp(max=num_timesteps - 1)

    def shift() -> Tensor:
        return hosts_shift(host.scheduler, x_start, model_arguments)

    return HostsTime(time_of, t_of, shift if time_sampler_of(host).use_timestep_transform else None)


def time_sampler_of(host: Any) -> Any:
    """What has the options of a rectified flow's draws: its scheduler, from Open-Sora 1.3 on a part of it."""
    return getattr(host.scheduler, "time_sampler", host.scheduler)


def hosts_shift(scheduler: Any, x_start: Tensor, model_arguments: Any) -> Tensor:
    """The shift s > 0, a scalar, by which a rectified flow's transform moves the t of a batch.

    It is measured, since each version has its own formula of height, width and frames: the host draws twice
    from the same random numbers, with its transform and without. A shift multiplies the odds t / (1 - t) by
    s.
    """
    devices = [x_start.device] if x_start.device.type == "cuda" else []
    odds = []
    for shifts in (True, False):
        with torch.random.fork_rng(devices):
            t = draw_hosts_t(_shifting(scheduler, shifts), x_start, model_arguments) / scheduler.num_timesteps
        odds.append(t / (1 - t))
    ratio: Tensor = (odds[0] / odds[1]).float().nanmedian().nan_to_num(nan=1.0)
    # A video of few frames may have a shift of 0, which draws t = 0 alone; see `checked`.
    return ratio.clamp(min=1e-6)


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


def _shifting(scheduler: Any, shifts: bool) -> Any:
    """A copy of a rectified flow's scheduler, with its timestep transform or without."""
    copied = copy.copy(scheduler)
    if hasattr(copied, "time_sampler"):
        copied.time_sampler = copy.copy(copied.time_sampler)
        # Above this threshold the host draws again, and its t is no shifted one.
        copied.time_sampler.uniform_over_threshold = None
    getattr(copied, "time_sampler", copied).use_timestep_transform = shifts
    return copied


class _DrawnTimestep(Exception):  # noqa: N818 - it carries a value out of the host and is no error
    def __init__(self, t: Tensor) -> None:
        super().__init__("the host has drawn its t")
        self.t = t


def _stop(original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    raise _DrawnTimestep(timesteps)
