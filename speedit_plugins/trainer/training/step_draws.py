"""The random numbers of a step."""

import torch
from torch import Tensor

from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import MODEL_STREAM, NOISE_STREAM, TIMESTEP_STREAM, stream_seed
from speedit_plugins.trainer.parallel.runtime import Runtime


class StepDraws:
    """Timesteps and seeds of a step: functions of the config's seed, the step and the sample's position.

    The position is that in the step's global batch, so they do not depend on the number of ranks. What the
    model draws from torch's own generator depends on the rank.

    Args:
        config: the experiment.
        runtime: the rank and its device.
        policy: draws the timesteps.
    """

    def __init__(self, config: ExperimentConfig, runtime: Runtime, policy: TimestepPolicy) -> None:
        self._runtime, self._policy = runtime, policy
        self._seed, self._batch_size = config.seed, config.data.batch_size
        self._num_quantiles = config.data.batch_size * config.optimizer.grad_accumulation
        self._num_rows = config.data.batch_size // runtime.data_size
        # One for the noise of each sample of this rank in a batch.
        self.generators = [torch.Generator(runtime.device) for _ in range(self._num_rows)]
        self._timestep_generator = torch.Generator(runtime.device)
        self._step = 0
        # For the timesteps of the step's global batch, equal on all ranks, so that strata span it.
        self.quantiles = torch.empty(0)

    def begin(self, step: int) -> None:
        """Begins a step, and seeds torch's own generator for it."""
        self._step = step
        torch.manual_seed(stream_seed(self._seed, MODEL_STREAM, step, self._runtime.data_rank))
        generator = self._timestep_generator.manual_seed(stream_seed(self._seed, TIMESTEP_STREAM, step))
        self.quantiles = self._policy.quantiles(self._num_quantiles, self._runtime.device, generator)

    def seed(self, number: int) -> None:
        """Seeds `generators` for the step's batch of this number."""
        for position, generator in enumerate(self.generators, start=self._first(number)):
            generator.manual_seed(stream_seed(self._seed, NOISE_STREAM, self._step, position))

    def timesteps(self, number: int, latents: Tensor) -> TimestepDraw:
        """The timesteps of this rank's samples in the step's batch of this number.

        Args:
            latents: the samples, (B, ...).
        """
        assert len(self.quantiles), "begin comes before"
        rows = slice(self._first(number), self._first(number) + self._num_rows)
        device = self._runtime.device
        if self._policy.needs_data:
            # In each batch anew, as its size may be another.
            self._policy.observe(latents)
            return self._policy.draw_at(self.quantiles[rows], device=device)
        # The halves of the global batch mirror each other in paired draws.
        return self._policy.draw_at(self.quantiles, device=device).map(lambda table: table[rows])

    def _first(self, number: int) -> int:
        """Where this rank's samples of a batch begin in the step's global batch."""
        return number * self._batch_size + self._runtime.data_rank * self._num_rows
