"""A host with the seam of NeMo Automodel's FlowMatchingPipeline, in own code."""

from typing import Any

import torch
from torch import Tensor


class FlowMatchingPipeline:
    """Draws sigma, noises, and makes the loss of each element."""

    def __init__(self, model_adapter: Any, flow_shift: float = 3.0, use_loss_weighting: bool = True) -> None:
        self.model_adapter = model_adapter
        self.flow_shift = flow_shift
        self.use_loss_weighting = use_loss_weighting
        self.loss_weighting_scheme = "linear"
        self.num_train_timesteps = 1000
        self.use_sigma_noise = True
        self.timestep_sampling = "uniform"

    def sample_timesteps(self, batch_size: int, device: Any = None) -> tuple[Tensor, Tensor, str]:
        """Sigma (B,), the model's timesteps, and the name of the law."""
        u = torch.rand(size=(batch_size,), device=device)
        sigma = self.flow_shift / (self.flow_shift + (1 / u - 1))
        return sigma, sigma * self.num_train_timesteps, "uniform"

    def compute_loss(self, model_pred: Tensor, target: Tensor, sigma: Tensor, batch: Any = None) -> Any:
        """The weighted loss of each element, its mean, and what else the host reports."""
        loss = (model_pred - target) ** 2
        weight = torch.ones_like(sigma)
        if self.use_loss_weighting:
            weight = 1 + self.flow_shift * sigma
        weight = weight.view(-1, *[1] * (loss.ndim - 1))
        return loss * weight, (loss * weight).mean(), loss, loss.mean(), weight, None

    def step(self, model: Any, batch: Any, device: Any = None, dtype: Any = torch.float32, **_: Any) -> Any:
        """One training step."""
        latents = batch["video_latents"].to(dtype)
        sigma, timesteps, _ = self.sample_timesteps(len(latents), device)
        noise = torch.randn_like(latents)
        column = sigma.view(-1, *[1] * (latents.ndim - 1))
        prediction = model((1 - column) * latents + column * noise, timesteps)
        weighted, mean, *_, mask = self.compute_loss(prediction, noise - latents, sigma, batch)
        return weighted, mean, mask, {}
