"""A host with CogVideoX's seam, in own code: a function returns a trainer, whose loss draws an index."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class LoraTrainer:
    """Trains a model of the velocity, by the error of the data that it tells."""

    def __init__(self, scheduler: Any, transformer: Any) -> None:
        self.components = SimpleNamespace(scheduler=scheduler, transformer=transformer)

    def compute_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch, a scalar."""
        latent = batch["encoded_videos"]
        batch_size = len(latent)
        timesteps = torch.randint(
            0, self.components.scheduler.config.num_train_timesteps, (batch_size,), device=latent.device
        )
        timesteps = timesteps.long()
        noise = torch.randn_like(latent)
        noised = self.components.scheduler.add_noise(latent, noise, timesteps)
        velocity = self.components.transformer(noised, timesteps)
        predicted = self.components.scheduler.get_velocity(velocity, noised, timesteps)
        weights = 1 / (1 - self.components.scheduler.alphas_cumprod[timesteps])
        while len(weights.shape) < len(predicted.shape):
            weights = weights.unsqueeze(-1)
        loss = torch.mean((weights * (predicted - latent) ** 2).reshape(batch_size, -1), dim=1)
        return loss.mean()


class SftTrainer(LoraTrainer):
    """Inherits its loss."""


def get_model_cls(model_name: str, training_type: str) -> type:
    """The trainer of a model."""
    return {"lora": LoraTrainer, "sft": SftTrainer}[training_type]
