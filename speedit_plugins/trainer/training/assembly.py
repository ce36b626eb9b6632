"""From a checked config to a trainer, before its first step."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import MASKS
from speedit_plugins.registry import build as build_registered
from speedit_plugins.trainer import build, checkpoint, results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import ResumableLoader, SampleSource
from speedit_plugins.trainer.inputs import BatchEncoder, Encoder
from speedit_plugins.trainer.logging.throughput import mfu_of
from speedit_plugins.trainer.logging.timestep_profile import build_profiler
from speedit_plugins.trainer.models.text import CaptionSource
from speedit_plugins.trainer.models.weights import load_weights, read_checkpoint
from speedit_plugins.trainer.parallel.booster import build_engine
from speedit_plugins.trainer.parallel.runtime import Runtime, build_device
from speedit_plugins.trainer.sampling.conditions import build_captions, grid_conditions
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.trainer import DrawGrid, Trainer, TrainingParts


def build_trainer(
    config: ExperimentConfig, runtime: Runtime | None = None, *, weights: str | None = None
) -> Trainer:
    """The trainer of a config, before its first step. Seeds torch's global generator.

    Args:
        runtime: None is a single process.
        weights: file or checkpoint folder with the weights to start from, as the config's `pretrained`.
    """
    runtime = runtime or Runtime(device=build_device(config))
    # The same on all ranks, so that they build the same model.
    torch.manual_seed(config.seed)
    encoder = build.build_encoder(config, runtime.device)
    # Before the dataset, which may read the header of every image.
    build.check_shapes(config, encoder)
    dataset = build.build_dataset(config)
    _check_cache(dataset, encoder, config)
    captions = build_captions(config, dataset, runtime.device)
    model = build.build_model(config, encoder, captions).to(runtime.device)
    if weights is not None:
        _load_pretrained(model, weights, captions, runtime)
    mfu = mfu_of(model, config, runtime)
    if config.compile:
        model.compile()
    process = build.build_process(config, respaced=True)
    loader = _loader(dataset, config, runtime)
    policy = build.build_timestep_policy(config, process)
    engine = build_engine(model, config, runtime)
    inputs = _batch_encoder(encoder, model, captions, config, runtime)
    profiler = None
    if config.profile_every and runtime.is_main:
        profiler = build_profiler(
            model, process, policy, inputs, dataset, config, world_size=runtime.world_size
        )
    parts = TrainingParts(engine, inputs, process, policy, loader, runtime, mfu, profiler)
    grids = _grids(model, encoder, captions, config) if config.sample_every else None
    return Trainer(parts, config, draw_grid=grids)


def _loader(dataset: SampleSource, config: ExperimentConfig, runtime: Runtime) -> ResumableLoader:
    return ResumableLoader(
        dataset,
        batch_size=config.data.batch_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        pin_memory=runtime.device.type == "cuda",
        rank=runtime.rank,
        world_size=runtime.world_size,
    )


def _batch_encoder(
    encoder: Encoder,
    model: nn.Module,
    captions: CaptionSource | None,
    config: ExperimentConfig,
    runtime: Runtime,
) -> BatchEncoder:
    return BatchEncoder(
        encoder,
        runtime.device,
        is_labelled=config.num_classes > 0,
        captions=captions,
        null_text=None if captions is None else cast(Mapping[str, Tensor], model.null_text),
        caption_dropout_prob=config.caption_dropout_prob,
        masks=None if config.inpainting is None else build_registered(MASKS, config.inpainting),
    )


def _grids(
    model: nn.Module, encoder: Encoder, captions: CaptionSource | None, config: ExperimentConfig
) -> DrawGrid:
    """What writes the sample grid of a step, with the averaged weights."""
    # Here, since the samplers load diffusers: a third of what a training without grids would load.
    from speedit_plugins.trainer.sampling.generator import SampleGenerator
    from speedit_plugins.trainer.sampling.grids import draw_grid

    generator = SampleGenerator(model, build.build_process(config, respaced=False), encoder, config)
    conditions = grid_conditions(config, captions)

    def write(averages: Mapping[str, Tensor], step: int) -> None:
        path = Path(config.experiment_dir) / results.GRIDS / f"step_{step:07d}.png"
        generator.source = f"step {step}"
        draw_grid(generator, conditions, path, weights=averages, may_fail=False)

    return write


def _check_cache(dataset: SampleSource, encoder: Encoder, config: ExperimentConfig) -> None:
    if isinstance(dataset, LatentCache) and dataset.encoder_fingerprint != encoder.fingerprint():
        raise ValueError(
            f"data.dataset: the latents in {config.data.dataset['root']} were made by another encoder than"
            f" {config.encoder}; wanted that one, or a cache made with this one"
        )


def _load_pretrained(model: nn.Module, path: str, captions: CaptionSource | None, runtime: Runtime) -> None:
    source = Path(path) / checkpoint.EMA if Path(path).is_dir() else Path(path)
    # A fine-tuning usually has other classes, so label embeddings may differ. The empty caption comes from
    # the run's own text encoder.
    named = (*model.state_dict(), *read_checkpoint(source))
    prefixes = ("y_embedder.", "null_tokens", "null_mask")
    excused = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in named)]
    report = load_weights(model, source, allow_mismatch=excused)
    if captions is not None:
        cast(Any, model).set_null_text(captions.encode([""]))
    if runtime.is_main:
        fresh = f"; freshly initialised: {', '.join(report.left_at_init)}" if report.left_at_init else ""
        say(f"fine-tuning from {path}: {len(report.loaded)} tensors{fresh}")
