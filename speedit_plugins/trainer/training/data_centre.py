"""Measures the centre of a policy that follows the data, before training; then it is part of the config."""

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.registry import DENSITIES, options_of
from speedit_plugins.trainer import build, checkpoints
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import NOISE_STREAM, ResumableLoader, stream_seed
from speedit_plugins.trainer.inputs import BatchEncoder
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.validation import training_part

NUM_SAMPLES = 1024
# So many values take 1.25 GiB: once as float32, and twice as float64 for one shape.
_MAX_VALUES = 2**26


def is_centred_by_data(config: ExperimentConfig) -> bool:
    """Whether the policy needs a centre that is not in the config.

    Raises:
        ValueError: a part of the policy is wrong, wherever its centre will be.
    """
    process = build.build_process(config, respaced=True)
    log_snr = process.schedule.log_snr
    asked: list[bool] = []

    def in_the_middle() -> DataSpectrum:
        asked.append(True)
        return DataSpectrum((-log_snr[len(log_snr) // 2]).exp().reshape(1))

    # A whole policy, so that all of it is checked before the data are read. The one that stays warns.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build_policy(
            config.diffusion.policy,
            process.schedule,
            process.prediction_type,
            data_spectrum=in_the_middle,
        )
    return bool(asked)


def centred(config: ExperimentConfig, runtime: Runtime, resumed: Path | None = None) -> ExperimentConfig:
    """The config with the centre of its policy, measured if it is needed and missing. Collective.

    Rank 0 measures it on up to `NUM_SAMPLES` samples of the first epoch. If they have several shapes, those
    of the most frequent shape count.

    Args:
        resumed: checkpoint from which the training continues. Its centre is kept.
    """
    if not is_centred_by_data(config):
        return config
    policy = config.diffusion.policy
    mean, fault = None, None
    try:
        if runtime.is_main:
            mean = _found(config, runtime, resumed)
    # The others wait for the centre.
    except (ValueError, OSError, MemoryError) as error:
        fault = error
    runtime.raise_together(fault)
    mean = runtime.gather_objects(mean)[0]
    if mean is None:
        # `auto` goes on without.
        return config
    diffusion = dataclasses.replace(config.diffusion, policy=_with_mean(policy, mean))
    return dataclasses.replace(config, diffusion=diffusion)


def _found(config: ExperimentConfig, runtime: Runtime, resumed: Path | None) -> float | None:
    """The centre in the checkpoint, or the measured one. Prints it."""
    mean, source = None if resumed is None else _kept(resumed), "as in the checkpoint"
    if mean is None:
        mean, source = _measured(config, runtime), "where half of the data's variance is explained"
    if mean is not None:
        # Adding 0.0 avoids "-0.00".
        say(f"the policy is centred at log-SNR {round(mean, 2) + 0.0:.2f}, {source}")
    return mean


def _with_mean(policy: Mapping[str, Any], mean: float) -> dict[str, Any]:
    """The policy with this mean where a law needs one and has none. It measures nothing any more."""
    if "density" not in policy:
        return {key: value for key, value in policy.items() if key != "num_samples"} | {"mean": mean}
    return {**policy, "density": _law_with_mean(policy["density"], mean)}


def _law_with_mean(law: str | Mapping[str, Any], mean: float) -> dict[str, Any]:
    options = options_of(law)
    if "laws" in options:
        return {**options, "laws": [_law_with_mean(part, mean) for part in options["laws"]]}
    # What takes the spectrum of the data takes a mean in its place.
    builder = DENSITIES.get(str(options.get("type")))
    if builder is None or "data_spectrum" not in inspect.signature(builder).parameters:
        return options
    options.pop("num_samples", None)
    return {**options, "mean": mean if options.get("mean") is None else options["mean"]}


def _kept(resumed: Path) -> float | None:
    """The centre in a checkpoint's config; None if its policy has none."""
    saved = load_config(resumed / checkpoints.CONFIG, "train").diffusion.policy
    return _mean_in(saved.get("density", saved))


def _mean_in(law: Any) -> float | None:
    if not isinstance(law, Mapping):
        return None
    found = (_mean_in(part) for part in law.get("laws", []))
    return law.get("mean", next((mean for mean in found if mean is not None), None))


def _measured(config: ExperimentConfig, runtime: Runtime) -> float | None:
    inputs = BatchEncoder(build.build_encoder(config, runtime.device), runtime.device, is_labelled=False)
    # The batch of one rank in training.
    batch_size = config.data.batch_size // runtime.data_size
    loader = ResumableLoader(
        training_part(config, build.build_dataset(config)),
        batch_size=batch_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
    )
    rows = _latents(loader, inputs, config.seed, runtime.device)
    # The most frequent shape.
    most = max(rows, key=lambda shape: (len(rows[shape]), shape))
    try:
        return DataSpectrum.of(torch.cat(rows[most])[:NUM_SAMPLES]).log_snr_at()
    except ValueError as error:
        if config.diffusion.policy.get("type") == "auto":
            say(f"the policy draws without a centre: {error}")
            return None
        raise ValueError(
            f"the policy's mean cannot be measured: {error}; or give the policy a mean"
        ) from error


def _latents(
    loader: ResumableLoader, inputs: BatchEncoder, seed: int, device: torch.device
) -> dict[torch.Size, list[Tensor]]:
    """Latents of the first epoch by their shape, up to `NUM_SAMPLES` of them. Closes the loader."""
    # Samples of different buckets have different shapes, and different principal components.
    rows: dict[torch.Size, list[Tensor]] = {}
    num_samples, num_values, batch_size = 0, 0, loader.batch_size
    try:
        while num_samples < NUM_SAMPLES and num_values < _MAX_VALUES and loader.epoch == 0:
            seeds = [stream_seed(seed, NOISE_STREAM, num_samples + place) for place in range(batch_size)]
            generators = [torch.Generator(device).manual_seed(number) for number in seeds]
            latents = inputs.encode(next(loader), generators).latents.cpu()
            rows.setdefault(latents.shape[1:], []).append(latents)
            num_samples, num_values = num_samples + len(latents), num_values + latents.numel()
    finally:
        loader.close()
    return rows
