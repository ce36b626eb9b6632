"""SimpleTuner's base model and three models, in small, with the host's signatures.

Dims: B batch.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def apply_flow_schedule_shift(args: Any, noise_scheduler: Any, sigmas: Tensor, noise: Tensor) -> Tensor:
    """Sigmas after the shift of the config."""
    shift = args.flow_schedule_shift or 1.0
    return sigmas * shift / (1 + (shift - 1) * sigmas)


class ModelFoundation:
    """Draws for a flow or, in `prepare_batch`, for a model of noise, and makes the loss."""

    is_flow = True
    noise_schedule: Any = None

    def __init__(self, config: Any) -> None:
        self.config = config
        self.accelerator = SimpleNamespace(device=torch.device("cpu"))
        self.diffusion_blocks_controller: Any = None

    def _sample_diffusion_blocks_discrete_timesteps(self, weights: Tensor, bsz: int) -> Tensor:
        raise NotImplementedError

    def sample_flow_sigmas(self, batch: dict[str, Any], state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sigmas = torch.rand(batch["latents"].shape[0])
        sigmas = apply_flow_schedule_shift(self.config, self.noise_schedule, sigmas, batch["noise"])
        return sigmas, sigmas * 1000.0

    def prepare_batch(self, batch: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        batch["latents"] = batch["latent_batch"]
        bsz = batch["latents"].shape[0]
        batch["noise"] = torch.randn_like(batch["latents"])
        if self.is_flow:
            batch["sigmas"], batch["timesteps"] = self.sample_flow_sigmas(batch=batch, state=state)
            batch["sigmas"] = batch["sigmas"].view(-1, 1, 1, 1)
            noised = (1 - batch["sigmas"]) * batch["latents"] + batch["sigmas"] * batch["noise"]
        else:
            weights = torch.ones(1000) / 1000
            if self.diffusion_blocks_controller is not None:
                batch["timesteps"] = self._sample_diffusion_blocks_discrete_timesteps(weights, bsz)
            elif not self.config.disable_segmented_timestep_sampling:
                batch["timesteps"] = (1000 * (torch.arange(bsz) + torch.rand(bsz)) / bsz).long()
            else:
                batch["timesteps"] = torch.multinomial(weights, bsz, replacement=True).long()
            noised = self.noise_schedule.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
        batch["noisy_latents"] = noised
        return batch

    def get_prediction_target(self, prepared_batch: dict[str, Any]) -> Tensor:
        noise: Tensor = prepared_batch["noise"]
        return noise - prepared_batch["latents"] if self.is_flow else noise

    def loss(
        self, prepared_batch: dict[str, Any], model_output: Any, apply_conditioning_mask: bool = True
    ) -> Tensor:
        target = self.get_prediction_target(prepared_batch)
        loss = F.mse_loss(model_output["model_prediction"].float(), target.float(), reduction="none")
        loss = loss.mean(dim=list(range(1, len(loss.shape))))
        loss = loss.mean()
        return loss  # noqa: RET504 - the host's statements


class Boogu(ModelFoundation):
    """Its network gets 1 - sigma."""

    def sample_flow_sigmas(self, batch: dict[str, Any], state: dict[str, Any]) -> tuple[Tensor, Tensor]:
        sigmas, _ = super().sample_flow_sigmas(batch=batch, state=state)
        return sigmas, 1 - sigmas


class Sana(ModelFoundation):
    """Its loss has both means in one statement, and weights of a scheme."""

    def loss(
        self, prepared_batch: dict[str, Any], model_output: Any, apply_conditioning_mask: bool = True
    ) -> Tensor:
        if not self.is_flow:
            return super().loss(prepared_batch, model_output, apply_conditioning_mask)
        target = self.get_prediction_target(prepared_batch)
        loss = (model_output["model_prediction"].float() - target.float()) ** 2
        loss = loss.mean(dim=list(range(1, len(loss.shape)))).mean()
        return loss  # noqa: RET504 - the host's statements


class Cosmos(ModelFoundation):
    """Its loss is a scalar at once."""

    def loss(
        self, prepared_batch: dict[str, Any], model_output: Any, apply_conditioning_mask: bool = True
    ) -> Tensor:
        return F.mse_loss(model_output["model_prediction"], self.get_prediction_target(prepared_batch))
