"""Seam D for imagen-pytorch: `Imagen.forward` draws a continuous time and hands it to `p_losses`.

There our time replaces it, and the host's `loss_fn` weighs each sample. Each unet of the cascade has a noise
schedule of its own, and so a policy of its own. The noise of the low-resolution conditioning stays the
host's. Outside training mode and without gradients everything does.

Dims: T timesteps, B batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
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
from speedit_plugins.hosts.draws.recomputation import is_first_of_two, is_recomputing, is_training
from speedit_plugins.hosts.draws.weighted_loss import scaled
from speedit_plugins.hosts.schedules import binned
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import Config


def fits(host: Any) -> bool:
    """Whether a host's object is an `Imagen`. The elucidated one draws sigmas and has no noise schedulers."""
    return hasattr(host, "noise_schedulers") and hasattr(host, "p_losses") and hasattr(host, "loss_fn")


def wrapped(
    host: Any,
    policy: str | Config | TimestepPolicy,
    prediction_type: str | None,
    stream: DrawStream,
) -> Any:
    """The host's object with a policy for each of its unets; see `with_policy`.

    Raises:
        ValueError: the policy is bad, or has weights while the host's Min-SNR is on; a prediction type is
            given; or the host has another version.
    """
    if prediction_type not in (None, "epsilon"):
        raise ValueError(
            "Imagen scales the loss of every objective to that of the noise: leave out prediction_type, got"
            f" {prediction_type!r}"
        )
    if not hasattr(host, "min_snr_gamma"):
        raise ValueError(
            "this Imagen does not say by min_snr_gamma how it weighs its loss: known to work are"
            " imagen-pytorch 2.0 and 2.1"
        )
    if isinstance(policy, TimestepPolicy) and len(host.noise_schedulers) > 1:
        raise ValueError(
            f"a built policy is one for all {len(host.noise_schedulers)} unets, and their noise schedules"
            " differ: pass its name or config, from which each unet gets its own"
        )
    parts = []
    for number, (scheduler, gamma) in enumerate(
        zip(host.noise_schedulers, host.min_snr_gamma, strict=True), 1
    ):
        built = (
            policy
            if isinstance(policy, TimestepPolicy)
            else build_policy(policy, schedule_of_unet(scheduler))
        )
        if gamma is not None:
            weighing = f"unet {number} of this Imagen weighs its loss by Min-SNR (gamma {gamma})"
            refuse_double_weights(built, weighing, "make it with min_snr_loss_weight=False")
        parts.append(Attachment(built, stream.for_part(number)))
    return attach(host, CascadeAttachment(parts), imagen_methods)


def schedule_of_unet(scheduler: Any) -> NoiseSchedule:
    """The continuous noise schedule of one unet at the midpoints of bins, 0 is clean.

    Args:
        scheduler: of imagen-pytorch; it has `log_snr(times)`.
    """

    def levels(time: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = scheduler.log_snr(time)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    return binned(levels)


@dataclass
class CascadeAttachment:
    """What is added to an Imagen.

    Args:
        parts: one attachment for each unet.
        call: the weights (B,) of the draw while a training call runs; see `under_way`.
    """

    parts: list[Attachment]
    call: Tensor | None = None


def imagen_methods(host_class: type) -> Mapping[str, Any]:
    """`p_losses` at our times, and a `loss_fn` that weighs while `p_losses` runs."""

    def p_losses(self: Any, unet: Any, x_start: Tensor, times: Tensor, **kwargs: Any) -> Tensor:
        own: Callable[..., Tensor] = hosts_method(self, host_class, imagen_methods, "p_losses")
        if not (self.training and is_training()):
            return own(unet, x_start, times, **kwargs)
        cascade: CascadeAttachment = attachment_of(self)
        number = next(n for n, s in enumerate(self.noise_schedulers) if s is kwargs["noise_scheduler"])
        part = cascade.parts[number]
        draw = part.draw(times, x_start, observed=self.normalize_img(x_start))
        # The host may multiply the errors by factors of its own, such as the SNR. The gradients of the loss
        # by the weights tell the loss that it minimises.
        learns = part.policy.learns
        if learns and is_first_of_two():
            raise ValueError(
                f"{part.policy.name!r} learns from the loss of each sample, which cannot be found without"
                " gradients: call torch.utils.checkpoint with use_reentrant=False"
            )
        weight = draw.weight.clone().requires_grad_(learns)
        with under_way(cascade, weight):
            loss = own(unet, x_start, draw.time.to(times.dtype), **kwargs)
        if learns and not is_recomputing():
            (minimised,) = torch.autograd.grad(loss, weight, retain_graph=True)
            part.learn(draw, minimised * len(weight))
        return loss

    def loss_fn(self: Any) -> Callable[..., Tensor]:
        own: Callable[..., Tensor] = self.__dict__["loss_fn"]
        cascade: CascadeAttachment = attachment_of(self)
        return own if cascade.call is None else _weighing(own, cascade.call)

    # Python looks at a property before the instance's own attribute of that name, so that one stays as it is.
    return {"p_losses": p_losses, "loss_fn": property(loss_fn)}


def _weighing(own: Callable[..., Tensor], weight: Tensor) -> Callable[..., Tensor]:
    def weighed(prediction: Tensor, target: Tensor, *, reduction: str) -> Tensor:
        return scaled(own(prediction, target, reduction=reduction), weight)

    return weighed
