"""Measures loss and gradient norm per range of timesteps, always on the same samples and noise.

Dims: T timesteps, B samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import NOISE_STREAM, ResumableLoader, SampleSource, stream_seed
from speedit_plugins.trainer.inputs import BatchEncoder, ModelInputs
from speedit_plugins.trainer.models.layers.sequence import whole_tokens

NUM_RANGES = 20


def range_of(index: Tensor, num_timesteps: int) -> Tensor:
    """Number of the range of an index, int64 in [0, NUM_RANGES). Range 0 has the cleanest timesteps."""
    return index * NUM_RANGES // num_timesteps


def timestep_ranges(num_timesteps: int) -> list[tuple[int, int]]:
    """[first, end) index of each range of `range_of`. Some are empty if T < NUM_RANGES."""
    edges = [-(-number * num_timesteps // NUM_RANGES) for number in range(NUM_RANGES + 1)]
    return list(zip(edges, edges[1:], strict=False))


@dataclass(frozen=True)
class TimestepProfile:
    """Means over the samples, per range, the cleanest first; None for an empty range.

    loss is weighted, mse is not. grad_norm is the norm of the gradient of the mean loss.
    """

    loss: list[float | None]
    mse: list[float | None]
    grad_norm: list[float | None]


class TimestepProfiler:
    """Measures given weights in each range, always on the same samples, noise and label dropout.

    It changes neither the training's random numbers nor its gradients.

    Args:
        model: the bare model. Its own parameters are not used.
        policy: weights the losses, with its weights at the time of the measurement.
        inputs: inputs of B samples. Each is noised to one timestep of every range.
        precision: bf16 runs the forward pass in autocast. fp16 is measured in float32, because small
            gradients would vanish without a loss scale.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        policy: TimestepPolicy,
        inputs: ModelInputs,
        *,
        precision: str,
    ) -> None:
        self._step = _ScoredStep(model, process, is_bf16=precision == "bf16")
        self._policy, self._inputs = policy, inputs

    def measure(self, trained: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> TimestepProfile:
        """The profile of the given weights, with the model in training mode.

        Args:
            trained: whole parameters by name, whose gradient counts.
            others: buffers and frozen parameters by name.
        """
        device = self._inputs.latents.device
        weights = {name: value.detach().to(device).requires_grad_() for name, value in trained.items()}
        named = {**{name: value.to(device) for name, value in others.items()}, **weights}
        held = {f"model.{name}": value for name, value in named.items()}
        model = self._step.model
        is_training = model.training
        model.train()
        columns: list[list[float | None]] = [[], [], []]
        try:
            for first, end in timestep_ranges(self._policy.schedule.num_timesteps):
                values: list[float | None] = [None] * len(columns)
                if first < end:
                    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
                    # Rank 0 measures alone.
                    with forked, whole_tokens(model):
                        torch.manual_seed(0)
                        arguments = (self._inputs, self._spread(first, end), list(weights.values()))
                        values = functional_call(self._step, held, arguments).tolist()
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
        finally:
            model.train(is_training)
        return TimestepProfile(*columns)

    def _spread(self, first: int, end: int) -> TimestepDraw:
        """B timesteps at even distances in [first, end)."""
        B, device = len(self._inputs.latents), self._inputs.latents.device
        place = (torch.arange(B, device=device) + 0.5) / B * (end - first)
        index = first + place.long()
        time = (index + 0.5) / self._policy.schedule.num_timesteps
        weight = self._policy.weight.float().to(device)[index]
        return TimestepDraw(index, time, weight, self._policy.scope)


def build_profiler(
    model: nn.Module,
    process: Process,
    policy: TimestepPolicy,
    encoder: BatchEncoder,
    dataset: SampleSource,
    config: ExperimentConfig,
    *,
    world_size: int = 1,
) -> TimestepProfiler:
    """The profiler of a run, on the first samples of its first epoch, as many as a rank has in a batch."""
    batch_size = config.data.batch_size // world_size
    batch = next(ResumableLoader(dataset, batch_size=batch_size, seed=config.seed))
    # A training step's seeds name the step too: these are none of them.
    seeds = [stream_seed(config.seed, NOISE_STREAM, position) for position in range(batch_size)]
    generators = [torch.Generator(encoder.device).manual_seed(seed) for seed in seeds]
    inputs = encoder.encode(batch, generators)
    return TimestepProfiler(model, process, policy, inputs, precision=config.precision)


class _ScoredStep(nn.Module):
    """Forward and backward in one call, so that recomputed activations see the weights of the call."""

    def __init__(self, model: nn.Module, process: Process, *, is_bf16: bool) -> None:
        super().__init__()
        self.model, self._process, self._is_bf16 = model, process, is_bf16

    def forward(self, inputs: ModelInputs, draw: TimestepDraw, weights: list[Tensor]) -> Tensor:
        """Mean loss, mean mse and gradient norm, (3,)."""
        noised = self._process.corrupt(inputs.latents, draw, noise=inputs.noise)
        with torch.autocast(noised.x_t.device.type, torch.bfloat16, enabled=self._is_bf16):
            prediction = self.model(noised.x_t, noised.timestep, inputs.condition)
        terms = self._process.loss(prediction, noised, draw)
        loss = terms.loss.mean()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        return torch.stack([loss.detach(), terms.mse.detach().mean(), norm])
