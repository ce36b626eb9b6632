"""A host's object draws sigma in one method and makes the loss of each element in another.

`sample_timesteps(batch_size, device)` returns sigma and the timesteps that the model gets. `compute_loss`
returns the loss of each element, its mean, and more. `step` calls both. This is the FlowMatchingPipeline of
NeMo Automodel.

Dims: B batch.
"""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_double_weights
from speedit_plugins.hosts.flow import HostsTime
from speedit_plugins.hosts.separate_draws import SeparateDraws
from speedit_plugins.hosts.trainers.replaced import exchange

HOST_CLASS = "FlowMatchingPipeline"


def adapt(module: ModuleType, draws_of: Callable[..., SeparateDraws]) -> None:
    """Puts a policy into the class of NeMo Automodel that trains flows.

    Args:
        module: the host's `nemo_automodel.components.flow_matching.pipeline`.
        draws_of: makes the `SeparateDraws`, at the first draw.

    Raises:
        ValueError: the class or a method is not there, or has a policy already. In the first step: the policy
            weighs, and so does the host.
    """
    pipeline = getattr(module, HOST_CLASS, None)
    if pipeline is None:
        raise ValueError(f"{module.__name__} has no {HOST_CLASS} (NeMo Automodel)")
    calls = PipelineCalls(draws_of)
    exchange(pipeline, "step", calls.stepping)
    exchange(pipeline, "sample_timesteps", calls.drawing)
    exchange(pipeline, "compute_loss", calls.weighing)


class PipelineCalls:
    """The methods that take the place of the host's.

    Args:
        draws_of: makes the `SeparateDraws`.
    """

    def __init__(self, draws_of: Callable[..., SeparateDraws]) -> None:
        self._draws_of = draws_of
        self._draws: SeparateDraws | None = None
        # The latents of the step that runs now; None outside of a step.
        self._latents: Tensor | None = None
        self._sigma: Tensor | None = None

    def stepping(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The host's `step`, whose batch the policy observes."""

        def step(self_: Any, model: Any, batch: Mapping[str, Any], *arguments: Any, **options: Any) -> Any:
            self._latents = next((batch[key] for key in _LATENTS if key in batch), None)
            if self._latents is None and torch.is_grad_enabled():
                raise ValueError(f"a batch of NeMo needs {' or '.join(_LATENTS)}, got {sorted(batch)}")
            try:
                return own(self_, model, batch, *arguments, **options)
            finally:
                self._latents = self._sigma = None

        return step

    def drawing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The host's `sample_timesteps` in a step, at the sigma of the policy."""

        def sample_timesteps(self_: Any, batch_size: int, device: torch.device | None = None) -> Any:
            if self._latents is None or not torch.is_grad_enabled():
                return own(self_, batch_size, device)
            if self._draws is None:
                self._draws = self._draws_of()
                if self_.use_loss_weighting:
                    refuse_double_weights(
                        self._draws.policy,
                        f"this pipeline weighs its loss ({self_.loss_weighting_scheme})",
                        "set use_loss_weighting to false",
                    )
            method = ""

            def hosts_draw() -> Tensor:
                nonlocal method
                sigma: Tensor
                sigma, _, method = own(self_, batch_size, device)
                return sigma

            def shift() -> float:
                return float(self_.flow_shift) if shifts(self_) else 1.0

            clock = HostsTime(torch.Tensor.float, lambda draw, t: draw.time.to(t), shift)
            self._sigma = self._draws.times(hosts_draw, self._latents, clock)
            return self._sigma, self._sigma * self_.num_train_timesteps, method

        return sample_timesteps

    def weighing(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """The host's `compute_loss` in a step, with the weights of the policy in its weighted loss."""

        def compute_loss(self_: Any, *arguments: Any, **options: Any) -> Any:
            weighted, mean, *others = own(self_, *arguments, **options)
            if self._sigma is None or self._draws is None:
                return (weighted, mean, *others)
            loss = self._draws.weigh(weighted, self._sigma)
            # With a weight of 1 the loss comes back as it is, and so does the host's mean of it.
            return (loss, mean if loss is weighted else loss.mean(), *others)

        return compute_loss


# The names that a batch has for its data.
_LATENTS = ("video_latents", "image_latents")


def shifts(pipeline: Any) -> bool:
    """Whether the pipeline's own draws have its `flow_shift`."""
    return bool(pipeline.use_sigma_noise) and pipeline.timestep_sampling != "beta"
