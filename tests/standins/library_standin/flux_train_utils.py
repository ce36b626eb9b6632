"""Draws the times of a flow and noises a batch at them, by the flag timestep_sampling."""

import math
from typing import Any

import torch
from torch import Tensor

# The host's module imports the other one too.
from library_standin import train_util  # noqa: F401 - for the import alone


def compute_density_for_timestep_sampling(
    weighting_scheme: str, batch_size: int, logit_mean: float, logit_std: float, mode_scale: float
) -> Tensor:
    """u (B,) in [0, 1]."""
    if weighting_scheme == "logit_normal":
        return torch.normal(mean=logit_mean, std=logit_std, size=(batch_size,)).sigmoid()
    return torch.rand(size=(batch_size,))


def compute_loss_weighting_for_sd3(weighting_scheme: str, sigmas: Any = None) -> Any:
    """Weights by sigma."""
    return sigmas**-2.0 if weighting_scheme == "sigma_sqrt" else torch.ones_like(sigmas)


def get_noisy_model_input_and_timesteps(
    args: Any, noise_scheduler: Any, latents: Tensor, noise: Tensor, device: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Noised data, timesteps and sigma."""
    size, total = len(latents), noise_scheduler.config.num_train_timesteps
    if args.timestep_sampling == "sigma":
        u = compute_density_for_timestep_sampling(
            weighting_scheme=args.weighting_scheme,
            batch_size=size,
            logit_mean=args.logit_mean,
            logit_std=args.logit_std,
            mode_scale=args.mode_scale,
        )
        row = (u * total).long()
        timesteps = noise_scheduler.timesteps[row].to(device)
        sigmas = noise_scheduler.sigmas.to(device, dtype)[row]
    else:
        if args.timestep_sampling == "uniform":
            sigmas = torch.rand((size,), device=device)
        else:
            sigmas = torch.sigmoid(args.sigmoid_scale * torch.randn(size, device=device))
        shift = {"shift": args.discrete_flow_shift, "flux_shift": math.exp(0.5)}.get(
            args.timestep_sampling, 1
        )
        sigmas = sigmas * shift / (1 + (shift - 1) * sigmas)
        timesteps = sigmas * total
    sigmas = sigmas.view(-1, *[1] * (latents.ndim - 1))
    if args.ip_noise_gamma:
        strength = args.ip_noise_gamma
        if args.ip_noise_gamma_random_strength:
            strength = strength * torch.rand(1, dtype=dtype)
        noise = noise + strength * torch.randn_like(latents, dtype=dtype)
    noisy = (1.0 - sigmas) * latents + sigmas * noise
    return noisy.to(dtype), timesteps.to(dtype), sigmas
