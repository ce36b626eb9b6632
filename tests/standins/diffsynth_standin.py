"""DiffSynth-Studio's training losses and scheduler of a flow, in small, with the host's signatures."""

from typing import Any

import torch
from torch import Tensor


class FlowMatchScheduler:
    """A table of 1,000 rows from noise to data, shifted by 3, and a bell of weights."""

    def __init__(self) -> None:
        sigmas = torch.linspace(1, 0.003, 1000)
        self.sigmas = 3 * sigmas / (1 + 2 * sigmas)
        self.timesteps = 1000 * self.sigmas

    def _row(self, timestep: Tensor) -> Tensor:
        return (self.timesteps - timestep).abs().argmin()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        sigma = self.sigmas[self._row(timestep)]
        return (1 - sigma) * original_samples + sigma * noise

    def training_target(self, sample: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        return noise - sample

    def training_weight(self, timestep: Tensor) -> Tensor:
        return torch.exp(-2 * (self.sigmas[self._row(timestep)] - 0.5) ** 2)


def FlowMatchSFTLoss(pipe: Any, **inputs: Any) -> Tensor:  # noqa: N802 - the host's name
    """The loss of one sample."""
    max_timestep_boundary = int(inputs.get("max_timestep_boundary", 1) * len(pipe.scheduler.timesteps))
    min_timestep_boundary = int(inputs.get("min_timestep_boundary", 0) * len(pipe.scheduler.timesteps))
    timestep_id = torch.randint(min_timestep_boundary, max_timestep_boundary, (1,))
    timestep = pipe.scheduler.timesteps[timestep_id].to(dtype=pipe.torch_dtype)
    noise = torch.randn_like(inputs["input_latents"])
    inputs["latents"] = pipe.scheduler.add_noise(inputs["input_latents"], noise, timestep)
    target = pipe.scheduler.training_target(inputs["input_latents"], noise, timestep)
    prediction = pipe.model_fn(**inputs, timestep=timestep)
    loss = torch.nn.functional.mse_loss(prediction.float(), target.float())
    loss = loss * pipe.scheduler.training_weight(timestep)
    return loss  # noqa: RET504 - the host's statements


def FlowMatchSFTAudioVideoLoss(pipe: Any, **inputs: Any) -> Tensor:  # noqa: N802 - the host's name
    """The loss of one sample with sound."""
    max_timestep_boundary = int(inputs.get("max_timestep_boundary", 1) * len(pipe.scheduler.timesteps))
    min_timestep_boundary = int(inputs.get("min_timestep_boundary", 0) * len(pipe.scheduler.timesteps))
    timestep_id = torch.randint(min_timestep_boundary, max_timestep_boundary, (1,))
    timestep = pipe.scheduler.timesteps[timestep_id].to(dtype=pipe.torch_dtype)
    noise = torch.randn_like(inputs["input_latents"])
    inputs["video_latents"] = pipe.scheduler.add_noise(inputs["input_latents"], noise, timestep)
    sound = torch.randn_like(inputs["audio_input_latents"])
    inputs["audio_latents"] = pipe.scheduler.add_noise(inputs["audio_input_latents"], sound, timestep)
    prediction, heard = pipe.model_fn(**inputs, timestep=timestep)
    loss = torch.nn.functional.mse_loss(prediction, noise - inputs["input_latents"])
    loss = loss * pipe.scheduler.training_weight(timestep)
    if inputs.get("audio_input_latents") is not None:
        loss_audio = torch.nn.functional.mse_loss(heard, sound - inputs["audio_input_latents"])
        loss_audio = loss_audio * pipe.scheduler.training_weight(timestep)
        loss = loss + loss_audio
    return loss  # noqa: RET504 - the host's statements
