"""A host with diffusion-pipe's seam, in own code: a model prepares its inputs, and a label with a mask."""

from typing import Any

from torch import Tensor
from torch.nn import functional


class CommonPipeline:
    """What the host's models have in common."""


class BasePipeline(CommonPipeline):
    """A model of the host."""

    def prepare_inputs(self, inputs: Any, timestep_quantile: float | None = None) -> Any:
        """Each model has its own."""
        raise NotImplementedError

    def get_loss_fn(self) -> Any:
        """The mean of squared errors times the mask; an empty mask masks nothing."""

        def loss_fn(output: Tensor, label: tuple[Tensor, Tensor]) -> Tensor:
            target, mask = label
            loss = functional.mse_loss(output, target, reduction="none")
            if mask.numel() > 0:
                loss *= mask
            return loss.mean()

        return loss_fn
