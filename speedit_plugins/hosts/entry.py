"""The one line that puts a policy into a host: `diffusion = with_policy(diffusion, policy="speedit")`.

Dims: T timesteps.
"""

from typing import Any

import torch

from speedit_plugins.hosts.attachment import refuse_attached, without_policy
from speedit_plugins.hosts.draws.draw_stream import DrawStream
from speedit_plugins.hosts.objects import (
    diffusion_object,
    drawing_object,
    flow_object,
    imagen,
    interpolant_loss,
)
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

__all__ = ["with_policy", "without_policy"]

# Those of the launcher. In this order, for a rectified flow's training_losses takes a t as a diffusion
# object's does.
_LAUNCHED: tuple[Any, ...] = (interpolant_loss, flow_object, diffusion_object, drawing_object)
_SEAMS: tuple[Any, ...] = (imagen, *_LAUNCHED)


def with_policy(
    diffusion: Any,
    policy: str | Config | TimestepPolicy = "recommended",
    *,
    prediction_type: str | None = None,
    generator: torch.Generator | None = None,
    ranks_alike: int | None = None,
    num_strata: int | None = None,
) -> Any:
    """Puts a timestep policy into a host's object. Returns the same object; `without_policy` takes it out.

    From then on the policy draws the timesteps that the object trains at, and weighs each sample's loss. Each
    training call is one step of a curriculum (`TimestepPolicy.advance`). Under `torch.no_grad()`, as in a
    validation, t and loss are the host's own.

    Example:
        >>> import torch
        >>> from speedit_plugins import with_policy
        >>> class Diffusion:  # a small one; DiT's is create_diffusion("")
        ...     alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
        ...     model_mean_type = "epsilon"
        ...     def training_losses(self, model, x_start, t):
        ...         mse = (model(x_start, t) ** 2.0).mean(1)
        ...         return {"mse": mse, "loss": mse}
        >>> diffusion = with_policy(Diffusion(), "speed", generator=torch.Generator().manual_seed(0))
        >>> host_t = torch.zeros(3, dtype=torch.int64)
        >>> diffusion.training_losses(lambda x, t: t.view(3, 1), torch.ones(3, 2), host_t)["mse"].sqrt()
        tensor([965., 704., 457.])

    Args:
        diffusion: the host's object, one of
            a diffusion object with `alphas_cumprod`, and `training_losses(model, x_start, t, ...)` or
            DiT-3D's `p_losses(denoise_fn, data, t, ...)`, or HunyuanDiT's, which draws t itself;
            a flow: SiT's transport, or a rectified flow with a `scheduler` (VideoSys, Open-Sora 1.2 and 1.3).
            A relative density (`Density`) thins its draws; any other replaces them, their shift included;
            a loss with `interpolant(t)`: the `SILoss` of REPA and REG, or REPA-E's model, also flows;
            an `Imagen` of imagen-pytorch.
        policy: see `build_policy`; or one that is built already, for this T (for a flow or an Imagen any T).
        prediction_type: what the model predicts; None reads it from the object. Needed if it does not say.
        generator: for the draws, on the device of t; None is a stream of its own for each data-parallel rank
            (`DrawStream`). The host's global generator stays as it is.
        ranks_alike: how many consecutive ranks draw alike, as a tensor- or sequence-parallel group has to.
            None is the host's own group, if it tells one, or 1. The number of processes: all draw alike.
        num_strata: N. Each N timesteps in a row, over ranks and micro-batches, have one of each of N equally
            likely strata of the policy. None draws independently.

    Raises:
        ValueError: the object has no such method, or has a policy already; the policy is for another T or
            schedule, thins a flow in pairs or strata, or has weights and so has the host;
            `prediction_type` is given beside a built policy, or is not what the object's own code says; or an
            option of the draws has no effect.
    """
    refuse_attached(diffusion)
    refuse_beside_built(policy, prediction_type)
    stream = DrawStream(generator, ranks_alike=ranks_alike, num_strata=num_strata)
    for seam in _SEAMS:
        if seam.fits(diffusion):
            return seam.wrapped(diffusion, policy, prediction_type, stream)
    raise ValueError(no_seam(diffusion))


def launched_seam(host: Any) -> Any:
    """The module of the seam by which the launcher puts a policy into this object; None if there is none.

    It has `attach_later` and `policy_for`.
    """
    return next((seam for seam in _LAUNCHED if seam.fits(host)), None)


def refuse_beside_built(policy: str | Config | TimestepPolicy, prediction_type: str | None) -> None:
    """Raises ValueError if a prediction type is given for a policy that is built already."""
    if prediction_type is not None and isinstance(policy, TimestepPolicy):
        raise ValueError(
            f"the policy {policy.name!r} is built for a prediction type already: leave out prediction_type"
        )


def no_seam(host: Any) -> str:
    """The message for an object that cannot take a policy: what was looked for."""
    return (
        f"{type(host).__module__}.{type(host).__qualname__} has no seam: looked for a method"
        f" {', '.join(diffusion_object.METHODS)} with an argument"
        f" {' or '.join(diffusion_object.TIMESTEP_NAMES)} (DiT, Latte, PixArt-alpha, OpenDiT, DiT-3D,"
        " Open-Sora-Plan 1.0); training_losses without it beside q_sample and _wrap_model"
        " (HunyuanDiT); path_sampler and training_losses (SiT, RAE); a scheduler with add_noise and"
        " training_losses (VideoSys 2.0, Open-Sora 1.2); noise_schedulers and p_losses (imagen-pytorch 2.1);"
        " interpolant, and __call__(model, images, ...) (REPA, REG) or forward(x, ..., loss_kwargs,"
        " time_input) (REPA-E)"
    )
