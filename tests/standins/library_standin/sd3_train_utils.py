"""Draws whole timesteps of a flow between two bounds, and noises a batch at them."""

from typing import Any

import torch
from torch import Tensor

from library_standin.flux_train_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,  # noqa: F401 - the host's module has it too
)


def get_noisy_model_input_and_timesteps(
    args: Any, latents: Tensor, noise: Tensor, device: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised data, timesteps and sigma."""
    u = compute_density_for_timestep_sampling(
        weighting_scheme=args.weighting_scheme,
        batch_size=len(latents),
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
    )
    low, high = args.min_timestep or 0, args.max_timestep or 1000
    u = u * args.training_shift / (1 + (args.training_shift - 1) * u)
    timesteps = (u * (high - low) + low).long().to(device, dtype)
    sigmas = (timesteps / 1000).view(-1, 1, 1, 1)
    return sigmas * noise + (1.0 - sigmas) * latents, timesteps, sigmas
