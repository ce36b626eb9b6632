"""Seam B: the host draws t and calls `diffusion.training_losses(model, x, t, ...)`.

That method puts our t in the place of the host's and weights the per-sample loss. DiT-3D's `p_losses` is the
same seam.

Dims: T timesteps, B batch.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from speedit_plugins.hosts.attachment import (
    Attachment,
    attach,
    attachment_of,
    hosts_method,
    refuse_double_weights,
)
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

METHODS = ("training_losses", "training_losses_diffusers", "p_losses")
TIMESTEP_NAMES = ("t", "timestep")
# Tables of hosts are float32 products of a thousand factors; schedules that differ do so by more than this.
SNR_TOLERANCE = 0.01
# Packages whose step evaluates two losses, of the masked and the whole input, at one t.
_SHARED_TIMESTEPS = ("masked_diffusion",)


def fits(host: Any) -> bool:
    """Whether a host's object has a training method that takes t."""
    return bool(_timesteps(type(host)))


def wrapped(
    host: Any,
    policy: str | Config | TimestepPolicy,
    prediction_type: str | None,
    generator: torch.Generator | None,
) -> Any:
    """The host's object with a policy in it; see `with_policy`."""
    refuse_other_seams(host)
    return attach(host, Attachment(policy_for(host, policy, prediction_type), generator), steered_methods)


def refuse_other_seams(host: Any) -> None:
    """Raises ValueError for an object of a host that is entered elsewhere, naming where."""
    if type(host).__module__.split(".")[0] in _SHARED_TIMESTEPS:
        raise ValueError(
            f"{type(host).__module__} trains two losses at one t, which a redraw inside training_losses"
            " would tear apart: use speedit_plugins.hosts.schedule_sampler.schedule_sampler"
        )
    if hasattr(host, "parameterization") and hasattr(host, "l_simple_weight"):
        raise ValueError(
            f"{type(host).__module__} returns one loss for the batch, which is too late to weigh: name"
            f" speedit_plugins.hosts.latent_diffusion.{type(host).__name__} as `target:` in the host's config"
        )


def policy_for(
    diffusion: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy on the schedule of a diffusion object; one that is built already is checked against it.

    Args:
        diffusion: see `schedule_of`; asked what it predicts where `prediction_type` is None.

    Raises:
        ValueError: a bad policy, one for another T or schedule, or one with weights beside the host's own.
    """
    schedule = schedule_of(diffusion)
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
            f"the policy is built on {built.schedule}, got a diffusion object with {schedule}: pass its name"
            " or config"
        )
    # PixArt's option: below t = 250 the error is that of x_0, which is the noise's over the SNR.
    if getattr(diffusion, "snr", False) is True:
        refuse_double_weights(built, "the host's snr_loss weighs its loss", "set snr_loss=False")
    return built


def steered_methods(host_class: type) -> Mapping[str, Callable[..., Any]]:
    """The training methods of a class, with our t in the place of the host's and weights in the loss."""
    return {name: _steered(host_class, name, at) for name, at in _timesteps(host_class).items()}


def _timesteps(host_class: type) -> dict[str, tuple[int, str]]:
    """Training methods of a class, with position and name of their timestep argument."""
    found = {}
    for method in METHODS:
        # A respacing subclass passes *args on: the names stand in the class that it extends.
        for owner in host_class.__mro__:
            names = (
                list(inspect.signature(owner.__dict__[method]).parameters) if method in owner.__dict__ else []
            )
            stated = [name for name in TIMESTEP_NAMES if name in names]
            if stated:
                found[method] = (names.index(stated[0]), stated[0])
                break
    return found


def _steered(host_class: type, method: str, timestep: tuple[int, str]) -> Callable[..., Any]:
    position, name = timestep

    @functools.wraps(getattr(host_class, method))
    def steered(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, steered_methods, method)
        # Without gradients it is an evaluation, at the t that the host chose.
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        attachment: Attachment = attachment_of(self)
        given = list(args)
        # `position` counts self.
        t = kwargs[name] if name in kwargs else given[position - 1]
        draw = attachment.draw(t)
        if name in kwargs:
            kwargs[name] = draw.index.to(t.dtype)
        else:
            given[position - 1] = draw.index.to(t.dtype)
        return attachment.weighted(own(*given, **kwargs), draw)

    return steered
