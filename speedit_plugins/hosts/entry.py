"""The one line: `diffusion = with_policy(diffusion, policy="speedit")`, for whatever a host trains with.

Dims: T timesteps.
"""

from typing import Any

import torch

from speedit_plugins.hosts import diffusion_object, flow_object, imagen
from speedit_plugins.hosts.attachment import refuse_attached, without_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.registry import Config

__all__ = ["with_policy", "without_policy"]

# A rectified flow's training_losses takes a t as well: the first seam that fits is the object's.
_SEAMS = (imagen, flow_object, diffusion_object)


def with_policy(
    diffusion: Any,
    policy: str | Config | TimestepPolicy = "speedit",
    *,
    prediction_type: str | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """Puts a timestep policy into a host's object; returns the same object. `without_policy` takes it out.

    Each training call is one step for a curriculum (`TimestepPolicy.advance`). Under `torch.no_grad()`, as in
    a validation, t and loss are the host's own.

    Args:
        diffusion: one of
            a diffusion object with `alphas_cumprod`, and `training_losses(model, x_start, t, ...)` or
            DiT-3D's `p_losses(denoise_fn, data, t, ...)`;
            a flow: SiT's transport, or a rectified flow with a `scheduler` (VideoSys, Open-Sora 1.2 and 1.3),
            whose own law of t is thinned by the policy's density;
            an `Imagen` of imagen-pytorch.
        policy: see `build_policy`; or a policy built for this object's number of timesteps (a flow and an
            Imagen, whose t is continuous, take any number).
        prediction_type: what the model predicts; None reads it from the object.
        generator: of the draws, on the device of t; None is that device's global one, as the host draws. A
            flow's t is the host's own draw: there it decides what is refused.

    Raises:
        ValueError: the object has none of these seams or has a policy already; the policy is for another T
            or schedule, draws pairs or strata for a flow, or has weights where the host weighs its loss
            already; or `prediction_type` beside a built policy.
    """
    refuse_attached(diffusion)
    if prediction_type is not None and isinstance(policy, TimestepPolicy):
        raise ValueError(
            f"the policy {policy.name!r} is built for a prediction type already: leave out prediction_type"
        )
    for seam in _SEAMS:
        if seam.fits(diffusion):
            return seam.wrapped(diffusion, policy, prediction_type, generator)
    raise ValueError(no_seam(diffusion))


def no_seam(host: Any) -> str:
    """Why an object cannot take a policy: what was looked for."""
    return (
        f"{type(host).__module__}.{type(host).__qualname__} has no seam: looked for a method"
        f" {', '.join(diffusion_object.METHODS)} with an argument"
        f" {' or '.join(diffusion_object.TIMESTEP_NAMES)} (DiT, Latte, PixArt-alpha, OpenDiT, DiT-3D,"
        " Open-Sora-Plan 1.0); path_sampler and training_losses (SiT); a scheduler with add_noise and"
        " training_losses (VideoSys 2.0, Open-Sora 1.2); noise_schedulers and p_losses (imagen-pytorch 2.1)"
    )
