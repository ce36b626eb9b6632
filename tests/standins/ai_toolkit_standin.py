"""ai-toolkit's trainer in small, with the host's signatures: what draws, and what makes the loss.

Dims: B batch.
"""

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class BaseSDTrainProcess:
    """Draws rows of the scheduler's table."""

    def __init__(self, sd: Any, options: Any) -> None:
        self.sd, self.train_config = sd, options
        self.device_torch = torch.device("cpu")

    def timer(self, name: str) -> Any:
        return contextlib.nullcontext()

    def process_general_training_batch(self, batch: Any) -> Any:
        with torch.no_grad():
            latents = batch.latents
            batch_size = len(batch.file_items)
            min_noise_steps = self.train_config.min_denoising_steps
            max_noise_steps = self.train_config.max_denoising_steps
            if self.sd.is_flow_matching:
                self.sd.noise_scheduler.set_train_timesteps(1000, device="cpu", timestep_type="linear")
            else:
                self.sd.noise_scheduler.set_timesteps(1000)
            with self.timer('prepare_timesteps_indices'):  # fmt: skip
                min_idx = min_noise_steps
                timestep_indices = torch.randint(min_idx, max_noise_steps, (batch_size,))
            timesteps = self.sd.noise_scheduler.timesteps[timestep_indices.long()]
            noise = torch.randn_like(latents)
            noisy_latents = self.sd.add_noise(latents, noise, timesteps)
        return noisy_latents, noise, timesteps, [], None


class SDTrainer(BaseSDTrainProcess):
    """Makes the loss."""

    def calculate_loss(
        self,
        noise_pred: Tensor,
        noise: Tensor,
        noisy_latents: Tensor,
        timesteps: Tensor,
        batch: Any,
        **kwargs: Any,
    ) -> Tensor:
        target = noise - batch.latents if self.sd.is_flow_matching else noise
        loss = (noise_pred - target) ** 2
        loss = loss.mean([1, 2, 3])
        loss = loss.mean()
        return loss  # noqa: RET504 - the host's statements


class Scheduler:
    """A flow's table of 1,000 rows from noise to data."""

    def set_train_timesteps(self, num_timesteps: int, device: str, timestep_type: str, **_: Any) -> None:
        self.timesteps = torch.linspace(1000, 1, num_timesteps)


def options() -> SimpleNamespace:
    """The options that decide on timesteps and losses, at the host's defaults but for a linear table."""
    return SimpleNamespace(
        min_denoising_steps=0,
        max_denoising_steps=999,
        timestep_type="linear",
        loss_target="noise",
        latent_multiplier=1.0,
    )
