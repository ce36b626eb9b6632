"""A host with the seam of LTX-2's trainer, in own code: strategies that draw for video and sound."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Modality:
    """Noised tokens (B, N, D) and their sigma (B,)."""

    latent: Tensor
    sigma: Tensor


@dataclass
class ModelInputs:
    """What a model gets, and its targets."""

    video: Modality | None
    audio: Modality | None
    video_targets: Tensor | None
    audio_targets: Tensor | None


class UniformTimestepSampler:
    """Draws uniformly."""

    def sample_for(self, batch: Tensor) -> Tensor:
        """Sigma (B,) for tokens (B, N, D)."""
        return torch.rand(len(batch))


class FlexibleStrategy:
    """Noises what its config says is generated."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare_training_inputs(self, batch: dict[str, Any], timestep_sampler: Any) -> ModelInputs:
        """Tokens and targets of a batch."""
        made: dict[str, Any] = {}
        for name in ("video", "audio"):
            made |= {name: None, f"{name}_targets": None}
            modality = getattr(self.config, name)
            if modality is None:
                continue
            tokens = batch[f"{name}_latents"]["latents"].flatten(2).transpose(1, 2)
            sigma = torch.zeros(len(tokens))
            if modality.is_generated:
                sigma = timestep_sampler.sample_for(tokens)
                noise = torch.randn_like(tokens)
                made[f"{name}_targets"] = noise - tokens
                tokens = (1 - sigma.view(-1, 1, 1)) * tokens + sigma.view(-1, 1, 1) * noise
            made[name] = Modality(tokens, sigma)
        return ModelInputs(**made)

    def compute_loss(
        self, video_pred: Tensor | None, audio_pred: Tensor | None, inputs: ModelInputs
    ) -> Tensor:
        """The loss (B,): that of the video, that of the sound, or their sum."""
        total = None
        for prediction, targets in ((video_pred, inputs.video_targets), (audio_pred, inputs.audio_targets)):
            if prediction is not None and targets is not None:
                loss = (prediction - targets).pow(2).mean(dim=[-2, -1])
                total = loss if total is None else total + loss
        if total is None:
            raise ValueError("nothing is generated")
        return total


class TextToVideoStrategy(FlexibleStrategy):
    """Another of the host's strategies."""

    def prepare_training_inputs(self, batch: dict[str, Any], timestep_sampler: Any) -> ModelInputs:
        """As above."""
        return super().prepare_training_inputs(batch, timestep_sampler)

    def compute_loss(
        self, video_pred: Tensor | None, audio_pred: Tensor | None, inputs: ModelInputs
    ) -> Tensor:
        """As above."""
        return super().compute_loss(video_pred, audio_pred, inputs)


class VideoToVideoStrategy(FlexibleStrategy):
    """Another of the host's strategies."""

    def prepare_training_inputs(self, batch: dict[str, Any], timestep_sampler: Any) -> ModelInputs:
        """As above."""
        return super().prepare_training_inputs(batch, timestep_sampler)

    def compute_loss(
        self, video_pred: Tensor | None, audio_pred: Tensor | None, inputs: ModelInputs
    ) -> Tensor:
        """As above."""
        return super().compute_loss(video_pred, audio_pred, inputs)
