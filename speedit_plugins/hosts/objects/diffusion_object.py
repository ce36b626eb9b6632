"""Seam B: the host draws t and calls `diffusion.training_losses(model, x, t, ...)`.

That method gets our t in place of the host's, and its loss is weighed for each sample. DiT-3D calls it
`p_losses`.

Dims: T timesteps, B batch.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from speedit_plugins.hosts.attachment import (
    Attachment,
    attach,
    attachment_of,
    hosts_method,
    refuse_double_weights,
)
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.schedules import prediction_type_of, refuse_contradiction, schedule_of
from speedit_plugins.policies.advice import warn_if_slow
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

METHODS = ("training_losses", "training_losses_diffusers", "p_losses")
TIMESTEP_NAMES = ("t", "timestep")
# A host's table may be a float32 product of a thousand factors. Two schedules differ by more than this.
SNR_TOLERANCE = 0.01
# Packages whose trainers use the t of their schedule sampler outside of the loss too, and for what.
_SAMPLED = {
    "masked_diffusion": "trains two losses at one t",
    "guided_diffusion": "logs its losses by the t of its schedule sampler",
    "improved_diffusion": "logs its losses by the t of its schedule sampler",
}


def fits(host: Any) -> bool:
    """Whether a host's object has a training method with an argument for t."""
    return bool(_timesteps(type(host)))


def wrapped(
    host: Any,
    policy: str | Config | TimestepPolicy,
    prediction_type: str | None,
    stream: DrawStream,
) -> Any:
    """The host's object with a policy; see `with_policy`."""
    refuse_other_seams(host)
    return attach(host, Attachment(policy_for(host, policy, prediction_type), stream), steered_methods)


def attach_later(
    host: Any,
    source: Callable[[], TimestepPolicy],
    stream: DrawStream,
    *,
    moves_boundary: bool = False,
) -> Any:
    """Lets a policy that is built when it first draws draw and weigh. Returns the same object.

    Args:
        host, source, stream: see `Attachment`.
        moves_boundary: has no effect: a diffusion host does not shift its draws.

    Raises:
        ValueError: see `refuse_other_seams`.
    """
    refuse_other_seams(host)
    return attach(host, Attachment(source, stream), steered_methods)


def refuse_other_seams(host: Any) -> None:
    """Raises ValueError if a policy goes in elsewhere for the object's host; the message says where."""
    reason = _SAMPLED.get(type(host).__module__.split(".")[0])
    if reason is not None:
        raise ValueError(
            f"{type(host).__module__} {reason}, and a draw in training_losses would be another: use"
            " speedit_plugins.hosts.schedule_sampler.schedule_sampler"
        )
    if hasattr(host, "parameterization") and hasattr(host, "l_simple_weight"):
        raise ValueError(
            f"{type(host).__module__} returns one loss for the whole batch, which cannot be weighed by"
            f" sample: name speedit_plugins.hosts.latent_diffusion.{type(host).__name__} as `target:` in the"
            " host's config"
        )


def policy_for(
    diffusion: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy for the noise schedule of a diffusion object. One that is built already is checked.

    Args:
        diffusion: see `schedule_of`.
        policy: name, config, or a built policy.
        prediction_type: what the model predicts; None asks the object.

    Raises:
        ValueError: the policy is bad, is for another T or schedule, or has weights and so has the host; or
            the object says that its model predicts something else.

    Warns:
        UserWarning: see `warn_if_slow`.
    """
    schedule = schedule_of(diffusion)
    refuse_contradiction(diffusion, prediction_type)
    built = policy
    if not isinstance(built, TimestepPolicy):
        built = build_policy(built, schedule, prediction_type or prediction_type_of(diffusion))
    if built.schedule.num_timesteps != schedule.num_timesteps:
        raise ValueError(
            f"the policy is built for T = {built.schedule.num_timesteps}, got a diffusion object with"
            f" {schedule.num_timesteps} timesteps"
        )
    if not torch.allclose(built.schedule.snr, schedule.snr, rtol=SNR_TOLERANCE):
        raise ValueError(
            f"the policy is built for {built.schedule}, got a diffusion object with {schedule}: pass the"
            " policy's name or config"
        )
    with suppress(ValueError):
        warn_if_slow(built, prediction_type or prediction_type_of(diffusion), policy)
    # An option of PixArt takes the error of x_0 below t = 250: that of the noise, over the SNR.
    if getattr(diffusion, "snr", False) is True:
        refuse_double_weights(built, "the host's snr_loss weighs its loss", "set snr_loss=False")
    return built


def steered_methods(host_class: type) -> Mapping[str, Callable[..., Any]]:
    """The training methods of a class, at our t in place of the host's, and with weights in the loss."""
    return {name: _steered(host_class, name, at) for name, at in _timesteps(host_class).items()}


@dataclass(frozen=True)
class _Argument:
    """An argument of a training method: its position, self included, and its name."""

    position: int
    name: str

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call, whose `args` are without self."""
        return kwargs[self.name] if self.name in kwargs else args[self.position - 1]


def _timesteps(host_class: type) -> dict[str, tuple[_Argument, _Argument]]:
    """The training methods of a class, with the arguments for the data and for t, which follows them."""
    found = {}
    for method in METHODS:
        # A subclass that respaces passes *args on: the names are in the class that it extends.
        for owner in host_class.__mro__:
            names = (
                list(inspect.signature(owner.__dict__[method]).parameters) if method in owner.__dict__ else []
            )
            stated = [name for name in TIMESTEP_NAMES if name in names]
            if stated:
                position = names.index(stated[0])
                data = _Argument(position - 1, names[position - 1])
                found[method] = (data, _Argument(position, stated[0]))
                break
    return found


def _steered(host_class: type, method: str, at: tuple[_Argument, _Argument]) -> Callable[..., Any]:
    data, timestep = at

    @functools.wraps(getattr(host_class, method))
    def steered(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, steered_methods, method)
        # An evaluation is at the t that the host chose.
        if not is_training():
            return own(*args, **kwargs)
        attachment: Attachment = attachment_of(self)
        given, t = list(args), timestep.of(args, kwargs)
        draw = attachment.draw(t, data.of(args, kwargs))
        if timestep.name in kwargs:
            kwargs[timestep.name] = draw.index.to(t.dtype)
        else:
            given[timestep.position - 1] = draw.index.to(t.dtype)
        return attachment.weighted(own(*given, **kwargs), draw)

    return steered
