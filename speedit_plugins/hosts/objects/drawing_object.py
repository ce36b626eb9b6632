"""Seam B for a diffusion object that draws t inside of `training_losses` (HunyuanDiT).

Dims: T timesteps, B batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from speedit_plugins.hosts.attachment import (
    Attachment,
    attach,
    attachment_of,
    hosts_method,
    refuse_double_weights,
    under_way,
)
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.draws.recomputation import is_training
from speedit_plugins.hosts.objects import diffusion_object
from speedit_plugins.hosts.objects.filled_timestep import FilledTimestep, Watched
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

KNOWN = "HunyuanDiT d2cb9cd"
_METHODS = ("training_losses", "q_sample", "_wrap_model")


def fits(host: Any) -> bool:
    """Whether a host's object trains without an argument for t, and has `q_sample` and `_wrap_model`."""
    has_methods = all(callable(getattr(host, name, None)) for name in _METHODS)
    return has_methods and hasattr(host, "alphas_cumprod") and not diffusion_object.fits(host)


def wrapped(
    host: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None, stream: DrawStream
) -> Any:
    """The host's object with a policy; see `with_policy`."""
    return attach_later(host, policy_for(host, policy, prediction_type), stream)


def attach_later(
    host: Any,
    source: TimestepPolicy | Callable[[], TimestepPolicy],
    stream: DrawStream,
    *,
    moves_boundary: bool = False,
) -> Any:
    """Lets a policy, or one that is built when it first draws, draw and weigh. Returns the same object.

    Args:
        host, source, stream: see `Attachment`.
        moves_boundary: has no effect: a diffusion host does not shift its draws.
    """
    return attach(host, Attachment(source, stream), methods)


def policy_for(
    host: Any, policy: str | Config | TimestepPolicy, prediction_type: str | None = None
) -> TimestepPolicy:
    """The policy for the object's noise schedule; see `diffusion_object.policy_for`.

    Raises:
        ValueError: see there; or the policy has weights, and so has the host (`mse_loss_weight_type`).
    """
    built = diffusion_object.policy_for(host, policy, prediction_type)
    own = getattr(host, "mse_loss_weight_type", "constant")
    if own != "constant":
        refuse_double_weights(
            built, f"mse_loss_weight_type {own!r} weighs the mse", "set --mse-loss-weight-type constant"
        )
    return built


def methods(host_class: type) -> Mapping[str, Callable[..., Any]]:
    """`training_losses` of a class at our t and with weights in its loss, and what puts that t there."""

    def training_losses(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        own = hosts_method(self, host_class, methods, "training_losses")
        # An evaluation is at the t that the host draws.
        if not is_training():
            return own(model, *args, **kwargs)
        attachment: Attachment = attachment_of(self)
        with under_way(attachment, FilledTimestep(model, KNOWN)) as filled:
            terms = own(model, *args, **kwargs)
        return attachment.weighted(terms, filled.confirmed())

    def q_sample(self: Any, x_start: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        attachment: Attachment = attachment_of(self)
        filled: FilledTimestep | None = attachment.call
        if filled is not None and filled.draw is None:
            filled.fill(t, lambda t: attachment.draw(t, x_start))
        return hosts_method(self, host_class, methods, "q_sample")(x_start, t, *args, **kwargs)

    def wrap_model(self: Any, model: Any) -> Any:
        if isinstance(model, Watched):
            return model
        filled: FilledTimestep | None = attachment_of(self).call
        hosts = hosts_method(self, host_class, methods, "_wrap_model")(model)
        return hosts if filled is None else filled.watched(hosts, model)

    return {"training_losses": training_losses, "q_sample": q_sample, "_wrap_model": wrap_model}
