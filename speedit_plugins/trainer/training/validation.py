"""Validation: the loss on samples that are not trained on, always at the same timesteps and noise.

Dims: N samples, B of them in a batch, K timesteps of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import default_collate

from speedit_plugins.policies.policy import TimestepDraw
from speedit_plugins.trainer import build
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.config.accelerations import AlignmentConfig
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.held_out import hold_out
from speedit_plugins.trainer.data.loader import VALIDATION_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.data.workers import DataError, sample_fault
from speedit_plugins.trainer.inputs import BatchEncoder, ModelInputs
from speedit_plugins.trainer.logging.tracking import NUM_BINS
from speedit_plugins.trainer.parallel.replica import AUTOCAST
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.periodic import Measured, Snapshot

# Fixed, so that validation losses compare between runs.
SEED = 0


class Validation:
    """Measures the unweighted mse of the averaged weights, without dropout.

    Each sample is noised to one timestep of each of `NUM_BINS` equal ranges. Over the samples, the timesteps
    of a range are spread evenly. Samples, timesteps and noise depend neither on the run's seed nor on its
    policy, and are the same each time, on any number of ranks.

    Args:
        model: the bare model. Its own parameters are not used.
        process: noises as in training.
        inputs: encodes as in training, without dropped captions.
        dataset: what is measured on.
        config: gives `validate_samples`, the batch size and the precision.
        runtime: the ranks that share the work.
    """

    def __init__(
        self,
        model: nn.Module,
        process: Process,
        inputs: BatchEncoder,
        dataset: SampleSource,
        config: ExperimentConfig,
        runtime: Runtime,
    ) -> None:
        self._model, self._process, self._inputs, self._dataset = model, process, inputs, dataset
        self._runtime, self._precision = runtime, config.precision
        self._batch_size = config.data.batch_size // runtime.data_size
        order = torch.randperm(len(dataset), generator=_generator("cpu"))
        self._chosen = order[: config.validate_samples].tolist()
        self._quantiles = spread_quantiles(len(self._chosen))

    def __call__(self, snapshot: Snapshot) -> Measured:
        """`val_loss`, and its means in the ranges of timesteps, the cleanest first. Collective.

        Raises:
            DataError: a sample cannot be loaded, on any rank.
        """
        weights = snapshot.everywhere
        sums = torch.zeros(NUM_BINS, dtype=torch.float64, device=self._runtime.device)
        is_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                fault = self._add(sums, weights)
        finally:
            self._model.train(is_training)
        faults = self._runtime.gather_objects(fault)
        for rank, said in enumerate(faults):
            if said is not None:
                where = f" (on rank {rank})" if len(faults) > 1 else ""
                raise DataError(f"validation: {said}{where}")
        self._runtime.sum(sums)
        means = (sums / len(self._chosen)).tolist()
        loss = sum(means) / NUM_BINS
        if self._runtime.is_main:
            say(f"step {snapshot.step}: val_loss {loss:.4f}")
        return Measured({"val_loss": loss, "val_loss_per_bin": means}, {"val_loss": loss})

    def _batches(self) -> Iterator[list[int]]:
        """Places in the list of samples. Samples of a batch have one shape."""
        buckets: Tensor | None = getattr(self._dataset, "buckets", None)
        groups: dict[int, list[int]] = {}
        for place, index in enumerate(self._chosen):
            groups.setdefault(0 if buckets is None else int(buckets[index]), []).append(place)
        for _, places in sorted(groups.items()):
            for first in range(0, len(places), self._batch_size):
                yield places[first : first + self._batch_size]

    def _add(self, sums: Tensor, weights: Mapping[str, Tensor]) -> str | None:
        """Adds the losses of this rank's batches; what is wrong with the first sample that cannot be loaded.

        The other ranks wait at the end of the loop, so the fault is told there.
        """
        for places in list(self._batches())[self._runtime.rank :: self._runtime.world_size]:
            indices = [self._chosen[place] for place in places]
            try:
                batch = [dict(self._dataset.load(index, _generator("cpu", index, 0))) for index in indices]
            except (ValueError, OSError, MemoryError) as error:
                return sample_fault(error)
            sums += self._losses(batch, places, weights)
        return None

    def _losses(
        self, batch: list[dict[str, Any]], places: Sequence[int], weights: Mapping[str, Tensor]
    ) -> Tensor:
        """Sum of the mse over these samples in each range, float64 (K,)."""
        device = self._runtime.device
        generators = [_generator(device, self._chosen[place], 1) for place in places]
        given = self._inputs.encode(cast(dict[str, Any], default_collate(batch)), generators)
        found = []
        for quantile in self._quantiles[:, list(places)]:  # (B,)
            noise = [
                torch.randn(latent.shape, generator=generator, device=device)
                for latent, generator in zip(given.latents, generators, strict=True)
            ]
            found.append(self._mse(replace(given, noise=torch.stack(noise)), quantile.to(device), weights))
        return torch.stack(found).double().sum(1)

    def _mse(self, given: ModelInputs, quantile: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The mse of each sample, (B,)."""
        T = self._process.schedule.num_timesteps
        index = (quantile * T).long().clamp(max=T - 1)
        draw = TimestepDraw(index, quantile.float(), torch.ones_like(quantile, dtype=torch.float32))
        noised = self._process.corrupt(given.latents, draw, noise=given.noise)
        kind, dtype = noised.x_t.device.type, AUTOCAST[self._precision]
        with torch.autocast(kind, dtype, enabled=self._precision != "fp32"):
            arguments = (noised.x_t, noised.timestep, given.condition)
            prediction = functional_call(self._model, dict(weights), arguments)
        return self._process.loss(prediction, noised, draw).mse


def spread_quantiles(num_samples: int) -> Tensor:
    """Where in [0, 1) each sample is noised in each range, float64 (K, N).

    In a range the samples are spread evenly, in an order of its own.
    """
    orders = [torch.randperm(num_samples, generator=_generator("cpu", number)) for number in range(NUM_BINS)]
    within = (torch.stack(orders).double() + 0.5) / num_samples
    return (torch.arange(NUM_BINS, dtype=torch.float64)[:, None] + within) / NUM_BINS


def validation_dataset(config: ExperimentConfig, dataset: SampleSource) -> SampleSource:
    """What the loss is measured on: `data.validation` without random flips, or what is held out of `dataset`.

    Args:
        dataset: the whole dataset of the training.

    Raises:
        ValueError: the classes of `data.validation` have other names than those that are trained on.
    """
    if config.data.validation is None:
        return hold_out(dataset, config.data.held_out_samples, seed=config.seed)[1]
    own = build.build_dataset(of_validation(config), augmented=False)
    ours, theirs = (tuple(getattr(each, "classes", ())) for each in (own, dataset))
    if ours and theirs and ours != theirs:
        different = sorted(set(ours) ^ set(theirs)) or list(ours)
        raise ValueError(
            f"data.validation needs the {len(theirs)} classes of data.dataset, in their order, got"
            f" {len(ours)} of which {', '.join(different[:3])} differ"
        )
    return own


def of_validation(config: ExperimentConfig) -> ExperimentConfig:
    """The config with its `data.validation` in the place of `data.dataset`."""
    assert config.data.validation is not None
    data = replace(config.data, dataset=config.data.validation, validation=None)
    # The loss is measured without an alignment.
    return replace(config, data=data, alignment=AlignmentConfig())


def training_part(config: ExperimentConfig, dataset: SampleSource) -> SampleSource:
    """What is trained on: the dataset without the samples that `data.held_out_samples` keeps out of it."""
    count = config.data.held_out_samples
    return hold_out(dataset, count, seed=config.seed)[0] if count else dataset


def _generator(device: torch.device | str, *path: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(stream_seed(SEED, VALIDATION_STREAM, *path))
