"""A trainer with the methods of musubi-tuner's by name and signature."""

from typing import Any

import torch
from torch import Tensor

from library_standin.flux_train_utils import (
    compute_density_for_timestep_sampling,
)


def compute_loss_weighting_for_sd3(
    weighting_scheme: str, noise_scheduler: Any, timesteps: Tensor, device: Any, dtype: torch.dtype
) -> Any:
    """Weights by sigma, or None."""
    return (timesteps / 1000) ** -2.0 if weighting_scheme == "sigma_sqrt" else None


class NetworkTrainer:
    """Draws, noises and makes a loss; `call_dit` is for subclasses."""

    def get_noisy_model_input_and_timesteps(
        self,
        args: Any,
        noise: Tensor,
        latents: Tensor,
        timesteps: list[float] | None,
        noise_scheduler: Any,
        device: Any,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Noised data, and timesteps from 1 on."""
        size, column = len(noise), (-1, *[1] * (latents.ndim - 1))
        low = 0 if args.min_timestep is None else args.min_timestep
        high = 1000 if args.max_timestep is None else args.max_timestep
        if args.timestep_sampling == "sigma":
            u = compute_density_for_timestep_sampling(
                weighting_scheme=args.weighting_scheme,
                batch_size=size,
                logit_mean=args.logit_mean,
                logit_std=args.logit_std,
                mode_scale=args.mode_scale,
            )
            row = (u * (high - low) + low).long()
            sigmas = noise_scheduler.sigmas[row].to(dtype).view(column)
            return sigmas * noise + (1.0 - sigmas) * latents, noise_scheduler.timesteps[row]
        u = torch.rand(size) if timesteps is None else torch.tensor(timesteps)
        if args.timestep_sampling == "shift":
            z = torch.logit(u.clamp(1e-7, 1 - 1e-7)) * args.sigmoid_scale
            u = z.sigmoid()
            u = u * args.discrete_flow_shift / (1 + (args.discrete_flow_shift - 1) * u)
        t = u * ((high - low) / 1000) + low / 1000
        noisy = (1 - t.view(column)) * latents + t.view(column) * noise
        return noisy, t * 1000.0 + 1

    def call_dit(self, *given: Any, **options: Any) -> Any:
        """Prediction and target; see process_batch."""
        raise NotImplementedError

    def process_batch(self, args: Any, *given: Any) -> tuple[Tensor, dict[str, float]]:
        """The mean loss of a batch, and nothing to log."""
        accelerator, transformer, _, batch, latents, noise, noise_scheduler, dit_dtype, network_dtype = given[
            :9
        ]
        noisy, timesteps = self.get_noisy_model_input_and_timesteps(
            args, noise, latents, batch["timesteps"], noise_scheduler, accelerator.device, dit_dtype
        )
        output = self.call_dit(
            args, accelerator, transformer, latents, batch, noise, noisy, timesteps, network_dtype
        )
        loss = torch.nn.functional.mse_loss(output.pred, output.target, reduction="none")
        return loss.mean(), {}
