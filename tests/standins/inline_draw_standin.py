"""A host with torchtitan's seam, in own code: a method that draws under no_grad and sums a squared error."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def preprocess(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The data of a batch."""
    return {"img_encodings": batch["image"] * 0.5}


class FluxTrainer:
    """Trains a model on batches of images."""

    def __init__(self, model: Callable[..., Tensor], loss_fn: Callable[..., Any]) -> None:
        self.model = model
        self.loss_fn = loss_fn

    def forward_backward_step(
        self, *, input_dict: dict[str, Tensor], labels: Tensor, global_valid_tokens: None = None
    ) -> Tensor:
        """One step. Returns the loss."""
        input_dict["image"] = labels
        labels = preprocess(input_dict)["img_encodings"]
        count = torch.tensor(labels.numel(), dtype=torch.float32)
        with torch.no_grad():
            noise = torch.randn_like(labels)
            timesteps = torch.rand((labels.shape[0],))
            sigmas = timesteps.view(-1, 1, 1, 1)
            noised = (1 - sigmas) * labels + sigmas * noise
        target = noise - labels
        prediction = self.model(noised, timesteps)
        loss, _ = self.loss_fn(prediction, target, count)
        del (noise, target)
        loss.backward()
        return loss
