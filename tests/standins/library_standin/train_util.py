"""Draws timesteps by index for a noise scheduler, and makes the loss of each element."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def get_timesteps(min_timestep: int, max_timestep: int, b_size: int, device: Any) -> Tensor:
    """Whole timesteps (B,) in [low, high)."""
    if min_timestep == max_timestep:
        return torch.full((b_size,), max_timestep).to(device)
    return torch.randint(min_timestep, max_timestep, (b_size,)).to(device)


def get_noise_noisy_latents_and_timesteps(
    args: Any, noise_scheduler: Any, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, noised data, and their timesteps."""
    noise = torch.randn_like(latents)
    low = args.min_timestep or 0
    high = len(noise_scheduler.alphas_cumprod) if args.max_timestep is None else args.max_timestep
    timesteps = get_timesteps(low, high, len(latents), latents.device)
    seen = noise
    if args.ip_noise_gamma:
        seen = noise + args.ip_noise_gamma * torch.randn_like(latents)
    return noise, noise_scheduler.add_noise(latents, seen, timesteps), timesteps


def conditional_loss(
    model_pred: Tensor, target: Tensor, loss_type: str, reduction: str, huber_c: Any = None
) -> Tensor:
    """The error of each element, or their mean."""
    losses = {"l2": functional.mse_loss, "l1": functional.l1_loss}
    return losses[loss_type](model_pred, target, reduction=reduction)
