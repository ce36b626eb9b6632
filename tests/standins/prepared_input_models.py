"""Models of the host in `prepared_input_standin`."""

from typing import Any

import torch
from prepared_input_standin import BasePipeline
from torch import Tensor
from torch.nn import functional


class FlowPipeline(BasePipeline):
    """Draws the t of a flow."""

    model_config: dict[str, Any]

    def prepare_inputs(self, inputs: Any, timestep_quantile: float | None = None) -> Any:
        """The noised latents and their t; the target and the mask."""
        latents = inputs["latents"].float()
        mask = inputs["mask"]
        bs = latents.shape[0]
        dist = torch.distributions.uniform.Uniform(0, 1)
        if timestep_quantile is not None:
            t = dist.icdf(torch.full((bs,), timestep_quantile))
        else:
            t = dist.sample((bs,))
        if shift := self.model_config.get("shift", None):
            t = (t * shift) / (1 + (shift - 1) * t)
        noise = torch.randn_like(latents)
        t_expanded = t.view(-1, *[1] * (latents.ndim - 1))
        noised = (1 - t_expanded) * latents + t_expanded * noise
        target = noise - latents
        t = t * 1000
        return (noised, t), (target, mask)


class NormalisedPipeline(FlowPipeline):
    """Divides its loss by the mean of its mask, so weights would be divided by their own mean."""

    def get_loss_fn(self) -> Any:
        """The masked mean."""

        def loss_fn(output: Tensor, label: tuple[Tensor, Tensor]) -> Tensor:
            target, mask = label
            return (functional.mse_loss(output, target, reduction="none") * mask / mask.mean()).mean()

        return loss_fn


class ImagePipeline(BasePipeline):
    """Draws an index, as the host's SDXL does."""

    def prepare_inputs(self, inputs: Any, timestep_quantile: float | None = None) -> Any:
        """The latents and an index."""
        timesteps = torch.randint(0, 1000, (len(inputs["latents"]),))
        return (inputs["latents"], timesteps), (inputs["latents"], inputs["mask"])
