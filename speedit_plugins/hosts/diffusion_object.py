"""Seam B: the host draws t and calls `diffusion.training_losses(model, x, t, ...)`.

The object changes its class, not its contents: to a subclass of the host's own, made once per class, whose
`training_losses` puts our t in the place of the host's and weights the per-sample loss. Everything else is
the host's, `isinstance` holds, and sampling is untouched. DiT-3D's `p_losses` is the same seam.

Dims: T timesteps, B batch.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.core.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.hosts.schedules import prediction_type_of, schedule_of
from speedit_plugins.registry import Config, build_policy

_METHODS = ("training_losses", "training_losses_diffusers", "p_losses")
_TIMESTEP_NAMES = ("t", "timestep")
_ATTRIBUTE = "_speedit_attachment"
# Packages whose step evaluates two losses, of the masked and the whole input, at one t.
_SHARED_TIMESTEPS = ("masked_diffusion",)


def with_policy(
    diffusion: Any,
    policy: str | Config | TimestepPolicy = "speedit",
    *,
    prediction_type: str | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Puts a timestep policy into a host's diffusion object; returns the same object.

    Each training call is one step for a curriculum (`TimestepPolicy.advance`).

    Args:
        diffusion: has `alphas_cumprod`, and `training_losses(model, x_start, t, ...)` or DiT-3D's
            `p_losses(denoise_fn, data, t, ...)`.
        policy: see `build_policy`; or a policy built for this object's number of timesteps.
        prediction_type: what the model predicts; None reads it from the object.
        generator: of the draws, on the device of t; None is that device's global one, as the host draws.

    Raises:
        ValueError: the object has no such method, has a policy already, or the policy is for another T.
    """
    check_seam(diffusion)
    if type(diffusion).__module__.split(".")[0] in _SHARED_TIMESTEPS:
        raise ValueError(
            f"{type(diffusion).__module__} trains two losses at one t, which a redraw inside training_losses"
            " would tear apart: use speedit_plugins.hosts.schedule_sampler.schedule_sampler"
        )
    return attach(diffusion, Attachment(policy_for(diffusion, policy, prediction_type), generator))


def policy_for(
    diffusion: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy on the schedule of a diffusion object; one that is built already is checked against it.

    Args:
        diffusion: see `schedule_of`; asked what it predicts where `prediction_type` is None.

    Raises:
        ValueError: a bad policy, or one for another T.
    """
    schedule = schedule_of(diffusion)
    if not isinstance(policy, TimestepPolicy):
        return build_policy(policy, schedule, prediction_type or prediction_type_of(diffusion))
    if policy.schedule.num_timesteps != schedule.num_timesteps:
        raise ValueError(
            f"the policy is built for T = {policy.schedule.num_timesteps}, got a diffusion object with"
            f" {schedule.num_timesteps} timesteps"
        )
    return policy


def check_seam(diffusion: Any) -> None:
    """Raises ValueError where an object has a policy already, or no training method that takes t."""
    if is_attached(diffusion):
        raise ValueError(f"{type(diffusion).__name__} has a policy already: without_policy removes it")
    if not _seams(type(diffusion)):
        raise ValueError(
            f"{type(diffusion).__module__}.{type(diffusion).__qualname__} has no seam: looked for a method"
            f" {', '.join(_METHODS)} with an argument {' or '.join(_TIMESTEP_NAMES)}"
        )


def attach(diffusion: Any, attachment: "Attachment") -> Any:
    """Lets an attachment draw and weigh for a host's object; returns the same object.

    Raises:
        ValueError: see `check_seam`.
    """
    check_seam(diffusion)
    setattr(diffusion, _ATTRIBUTE, attachment)
    host_class: type = type(diffusion)
    diffusion.__class__ = _attached_class(host_class)
    return diffusion


def attachment_of(diffusion: Any) -> "Attachment":
    """The attachment of an object that has one."""
    return cast(Attachment, getattr(diffusion, _ATTRIBUTE))


def without_policy(diffusion: Any) -> Any:
    """Gives the host its object back as it was; returns it.

    Raises:
        ValueError: the object has no policy.
    """
    if not is_attached(diffusion):
        raise ValueError(f"{type(diffusion).__name__} has no policy to remove")
    diffusion.__class__ = type(diffusion).host_class
    delattr(diffusion, _ATTRIBUTE)
    return diffusion


def is_attached(diffusion: Any) -> bool:
    """Whether `with_policy` was applied to this object."""
    return hasattr(type(diffusion), "host_class") and hasattr(diffusion, _ATTRIBUTE)


@dataclass
class Attachment:
    """What `with_policy` adds to an object.

    Args:
        policy: draws and weights.
        generator: of the draws; None is the global one.
        num_calls: training calls so far.
        is_sum: whether the host's loss is mse + vb to the bit; None before the first call.
    """

    policy: TimestepPolicy
    generator: torch.Generator | None = None
    num_calls: int = 0
    is_sum: bool | None = None

    def draw(self, t: Tensor) -> TimestepDraw:
        """The draw that takes the place of the host's t (B,), on its device."""
        self.policy.advance(self.num_calls)
        self.num_calls += 1
        return self.policy.draw(len(t), device=t.device, generator=self.generator)

    def weighted(self, terms: Any, draw: TimestepDraw) -> Any:
        """The host's loss terms with the draw's weights in `loss`; all other terms as they are.

        Args:
            terms: dict with per-sample `loss` (B,), `mse` and perhaps `vb`; or the loss (B,) itself.

        Raises:
            ValueError: anything else, or no mse where the policy weighs it.
        """
        if isinstance(terms, Tensor):
            self.policy.update(draw.index, terms.detach())
            return draw.weight.to(terms.dtype) * terms
        if not isinstance(terms, Mapping) or "loss" not in terms:
            raise ValueError(
                f"the host's training method returns {type(terms).__name__}, wanted a loss (B,) or a dict"
                " with one: distillation (PixArt's LCM) is not this seam"
            )
        loss, weight = terms["loss"], draw.weight.to(terms["loss"].dtype)
        self.policy.update(draw.index, loss.detach())
        if draw.scope == "loss":
            return {**terms, "loss": weight * loss}
        if "mse" not in terms:
            raise ValueError(
                f"the host's terms {sorted(terms)} have no mse to weight (a KL loss?);"
                " wanted a policy of scope 'loss'"
            )
        mse = terms["mse"]
        rest = terms.get("vb")
        if self.is_sum is None:
            self.is_sum = torch.equal(loss, mse if rest is None else mse + rest)
        if self.is_sum:
            return {**terms, "loss": weight * mse if rest is None else weight * mse + rest}
        # The host adds or scales on its own account: change its loss by what the weight changes of the mse.
        return {**terms, "loss": loss + (weight - 1) * mse}


@functools.cache
def _attached_class(host_class: type) -> type:
    methods: Mapping[str, Any] = {
        name: _steered(host_class, name, at) for name, at in _seams(host_class).items()
    }
    members = {
        "host_class": host_class,
        "__module__": host_class.__module__,
        "__doc__": host_class.__doc__,
        "__reduce_ex__": _reduce,
        **methods,
    }
    return type(host_class.__name__, (host_class,), members)


def _seams(host_class: type) -> dict[str, tuple[int, str]]:
    """Training methods of a class, with position and name of their timestep argument."""
    found = {}
    for method in _METHODS:
        # A respacing subclass passes *args on: the names stand in the class that it extends.
        for owner in host_class.__mro__:
            names = (
                list(inspect.signature(owner.__dict__[method]).parameters) if method in owner.__dict__ else []
            )
            stated = [name for name in _TIMESTEP_NAMES if name in names]
            if stated:
                found[method] = (names.index(stated[0]), stated[0])
                break
    return found


def _steered(host_class: type, method: str, timestep: tuple[int, str]) -> Callable[..., Any]:
    position, name = timestep

    @functools.wraps(getattr(host_class, method))
    def steered(self: Any, *args: Any, **kwargs: Any) -> Any:
        attachment = attachment_of(self)
        hosts_method = getattr(super(_attached_class(host_class), self), method)
        given = list(args)
        # `position` counts self.
        t = kwargs[name] if name in kwargs else given[position - 1]
        draw = attachment.draw(t)
        if name in kwargs:
            kwargs[name] = draw.index.to(t.dtype)
        else:
            given[position - 1] = draw.index.to(t.dtype)
        return attachment.weighted(hosts_method(*given, **kwargs), draw)

    return steered


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickles and copies by the host's class: the attached one is made anew where it is loaded."""
    return _unpickled, (type(self).host_class,), self.__dict__


def _unpickled(host_class: type) -> Any:
    return object.__new__(_attached_class(host_class))
