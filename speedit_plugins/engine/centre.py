"""The centre of a policy that follows the data: measured before training, then part of the config."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.data.loader import NOISE_STREAM, ResumableLoader, stream_seed
from speedit_plugins.engine import build
from speedit_plugins.engine.inputs import BatchEncoder
from speedit_plugins.engine.runtime import Runtime
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.engine.tracking import say
from speedit_plugins.registry import build_policy
from speedit_plugins.spectrum import DataSpectrum

NUM_SAMPLES = 1024
# Of the samples that are measured: 512 MiB in float64.
_MAX_VALUES = 2**26


def is_centred_by_data(config: ExperimentConfig) -> bool:
    """Whether the policy needs a centre that the config does not say."""
    asked = []

    def unknown() -> DataSpectrum:
        asked.append(True)
        return DataSpectrum(torch.ones(1))

    process = build.build_process(config, respaced=True)
    policy, prediction_type = config.diffusion.policy, process.prediction_type
    build_policy(policy, process.schedule, prediction_type, data_spectrum=unknown)
    return bool(asked)


def centred(config: ExperimentConfig, runtime: Runtime) -> ExperimentConfig:
    """The config with the centre of its policy, which is measured where it is needed and missing. Collective.

    Rank 0 measures for all, on up to `NUM_SAMPLES` samples of the first epoch.
    """
    if not is_centred_by_data(config):
        return config
    measured = _measured(config, runtime.device) if runtime.is_main else None
    mean = runtime.gather_objects(measured)[0]
    if runtime.is_main:
        say(f"the policy is centred at log-SNR {mean:.2f}, where half of the data's variance is explained")
    policy: dict[str, Any] = dict(config.diffusion.policy)
    if "density" in policy:
        density = policy["density"]
        policy["density"] = {**({"type": density} if isinstance(density, str) else density), "mean": mean}
    else:
        policy["mean"] = mean
    return dataclasses.replace(config, diffusion=dataclasses.replace(config.diffusion, policy=policy))


def _measured(config: ExperimentConfig, device: torch.device) -> float:
    inputs = BatchEncoder(build.build_encoder(config, device), device, is_labelled=False)
    loader = ResumableLoader(build.build_dataset(config), batch_size=config.data.batch_size, seed=config.seed)
    rows: list[Tensor] = []
    while sum(map(len, rows)) < NUM_SAMPLES and loader.epoch == 0:
        position = len(rows)
        batch = next(loader)
        seeds = [
            stream_seed(config.seed, NOISE_STREAM, position, place) for place in range(config.data.batch_size)
        ]
        latents = inputs.encode(batch, [torch.Generator(device).manual_seed(seed) for seed in seeds]).latents
        # Buckets have other shapes, and with them other components: the first shape speaks for all.
        if not rows or latents[0].numel() == rows[0].shape[1]:
            rows.append(latents.flatten(1).cpu())
        if (len(rows) + 1) * rows[0].numel() > _MAX_VALUES:
            break
    return DataSpectrum.of(torch.cat(rows)).log_snr_at()
