"""From a checked config to a trainer, before its first step."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer import build, results
from speedit_plugins.trainer.accelerations.build import build_accelerations
from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.accelerations.teachers import build_teacher
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.identity import TIMES
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import ResumableLoader, SampleSource
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.inputs import BatchEncoder, Encoder, FeatureSource
from speedit_plugins.trainer.layouts import check_first_shape
from speedit_plugins.trainer.logging.throughput import mfu_of
from speedit_plugins.trainer.logging.timestep_profile import build_profiler
from speedit_plugins.trainer.low_resolution import build_low_resolution
from speedit_plugins.trainer.models.pretrained.text import CaptionSource, CaptionTable
from speedit_plugins.trainer.parallel.engines import build_engine
from speedit_plugins.trainer.parallel.runtime import Runtime, build_device
from speedit_plugins.trainer.sampling.conditions import (
    all_conditions,
    build_captions,
    grid_conditions,
)
from speedit_plugins.trainer.starting_weights import start_from
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.periodic import Measured, Periodic, Snapshot
from speedit_plugins.trainer.training.sequence import share_samples
from speedit_plugins.trainer.training.trainer import Trainer, TrainingParts
from speedit_plugins.trainer.training.validation import (
    Validation,
    training_part,
    validation_dataset,
)


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
    # Before the dataset: it may read the header of every image.
    build.check_shapes(config, encoder)
    dataset = _in_turn(runtime, lambda: build.build_dataset(config))
    _check_cache(dataset, encoder, config, "data.dataset")
    check_first_shape(dataset, config)
    captions = build_captions(config, dataset, runtime.device)
    model = build.build_model(config, encoder, captions).to(runtime.device)
    # The weights that adapters are trained on are in no checkpoint.
    base = weights if weights is not None or not config.lora.rank else config.pretrained
    start_from(model, base, config, captions, say=say if runtime.is_main else None)
    process = build.build_process(config, respaced=True)
    teacher = build_teacher(config, dataset, runtime.device)
    accelerations = build_accelerations(config, model, process, teacher)
    mfu = mfu_of(model, config, runtime)
    # Under fsdp2 the engine compiles the blocks: the hooks around them are not compiled.
    if config.compile and config.plugin != "fsdp2":
        model.compile()
    trained = training_part(config, dataset)
    loader = _loader(trained, config, runtime)
    _check_same_data(loader, runtime)
    policy = build.build_timestep_policy(config, process)
    engine = build_engine(model, config, runtime)
    share_samples(engine.module, config, runtime)
    inputs = _batch_encoder(encoder, model, captions, config, runtime, teacher)
    profiler = None
    if config.profile_every and runtime.is_main:
        profiler = build_profiler(
            engine.template, process, policy, inputs, trained, config, world_size=runtime.data_size
        )
    objective = Objective(engine, process, accelerations)
    parts = TrainingParts(engine, inputs, objective, policy, loader, runtime, mfu, profiler)
    periodic = _periodic(engine.template, encoder, dataset, captions, process, config, runtime)
    return Trainer(parts, config, periodic=periodic)


def _periodic(
    model: nn.Module,
    encoder: Encoder,
    dataset: SampleSource,
    captions: CaptionSource | None,
    process: build.Process,
    config: ExperimentConfig,
    runtime: Runtime,
) -> list[Periodic]:
    """What the config wants measured in the training, in the order in which it is measured.

    It is built after the model, so that random numbers drawn here do not change its initialisation.
    """
    periodic = []
    if config.validate_every:
        own, measured = captions, _in_turn(runtime, lambda: validation_dataset(config, dataset))
        if config.data.validation is not None:
            _check_cache(measured, encoder, config, "data.validation")
            own = _other_captions(captions, measured, config, runtime)
        undropped = _batch_encoder(encoder, model, own, replace(config, caption_dropout_prob=0.0), runtime)
        measure = Validation(model, process, undropped, measured, config, runtime)
        periodic.append(Periodic("validate_every", config.validate_every, measure))
    if config.sample_every:
        classes = tuple(getattr(dataset, "classes", ()))
        normalization = getattr(dataset, "normalization", None)
        grids = _grids(model, encoder, captions, config, classes, normalization)
        periodic.append(Periodic("sample_every", config.sample_every, grids))
    if config.evaluate_every:
        evaluation = _evaluation(model, encoder, captions, config, runtime)
        periodic.append(Periodic("evaluate_every", config.evaluate_every, evaluation))
    return periodic


def _loader(dataset: SampleSource, config: ExperimentConfig, runtime: Runtime) -> ResumableLoader:
    return ResumableLoader(
        dataset,
        batch_size=config.data.batch_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        pin_memory=runtime.device.type == "cuda",
        rank=runtime.data_rank,
        world_size=runtime.data_size,
        accept_changed=config.data.accept_changed,
        # Ranks that share samples have the same part of a batch.
        is_silent=not runtime.is_main,
    )


def _in_turn(runtime: Runtime, built: Callable[[], SampleSource]) -> SampleSource:
    """The dataset. The first process of each machine lists the files, and the others read its index."""
    is_first = int(os.environ.get("LOCAL_RANK", runtime.rank)) == 0
    if not is_first:
        runtime.barrier()
    try:
        return built()
    finally:
        if is_first:
            runtime.barrier()


def _check_same_data(loader: ResumableLoader, runtime: Runtime) -> None:
    """Raises ValueError if a process has other data than rank 0, as on a machine with another copy."""
    own = {"number": str(len(loader.dataset)), **(loader.identity or {})}
    own.pop(TIMES, None)
    everyone = runtime.gather_objects(own)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            names = ", ".join(key for key in other if other[key] != everyone[0].get(key))
            raise ValueError(f"data.dataset: rank {rank} has other data than rank 0: other {names}")


def _batch_encoder(
    encoder: Encoder,
    model: nn.Module,
    captions: CaptionSource | None,
    config: ExperimentConfig,
    runtime: Runtime,
    teacher: FeatureSource | None = None,
) -> BatchEncoder:
    return BatchEncoder(
        encoder,
        runtime.device,
        is_labelled=config.num_classes > 0,
        captions=captions,
        null_text=None if captions is None else cast(Mapping[str, Tensor], model.null_text),
        caption_dropout_prob=config.caption_dropout_prob,
        masks=build.build_masks(config),
        teacher=teacher,
        low_resolution=build_low_resolution(config, encoder),
    )


def _other_captions(
    captions: CaptionSource | None, dataset: SampleSource, config: ExperimentConfig, runtime: Runtime
) -> CaptionSource | None:
    """What encodes the captions of another dataset than the one that is trained on."""
    # A separate table: more captions in the training's would change the last bits of its features.
    if isinstance(captions, CaptionTable) or isinstance(dataset, LatentCache):
        return build_captions(config, dataset, runtime.device)
    return captions


def _grids(
    model: nn.Module,
    encoder: Encoder,
    captions: CaptionSource | None,
    config: ExperimentConfig,
    classes: tuple[str, ...],
    normalization: Normalization | None,
) -> Callable[[Snapshot], Measured]:
    """What writes the sample grid of a step on rank 0, while the others wait."""
    # Here, since the samplers load diffusers: a third of what a training without grids would load.
    from speedit_plugins.trainer.sampling.generator import SampleGenerator
    from speedit_plugins.trainer.sampling.grids import draw_grid
    from speedit_plugins.trainer.sampling.inpainting.holes import Holes
    from speedit_plugins.trainer.sampling.inpainting.inpaint import draw_dataset_fills
    from speedit_plugins.trainer.sampling.super_resolution.enlargements import draw_enlargements
    from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import given_conditions

    process = build.build_process(config, respaced=False)
    generator = SampleGenerator(model, process, encoder, config, normalization=normalization)
    number = config.samples_per_class
    if config.inpainting is not None:
        draw = partial(draw_dataset_fills, generator, Holes(config, num_samples=number), captions)
    elif config.super_resolution.factor:
        given = given_conditions(config, generator, captions, num_samples=number, classes=classes)
        draw = partial(draw_enlargements, generator, given)
    else:
        draw = partial(draw_grid, generator, grid_conditions(config, captions, classes))

    def write(snapshot: Snapshot) -> Measured:
        weights = snapshot.on_main
        if not weights:
            return Measured()
        path = Path(config.experiment_dir) / results.GRIDS / f"step_{snapshot.step:07d}.png"
        generator.source = f"step {snapshot.step}"
        draw(path, weights=weights, may_fail=False)
        return Measured(pictures={"samples": path.with_suffix(".gif") if config.num_frames else path})

    return write


def _check_cache(dataset: SampleSource, encoder: Encoder, config: ExperimentConfig, key: str) -> None:
    """Raises ValueError if the dataset under this key of the config has latents of another encoder."""
    if isinstance(dataset, LatentCache) and dataset.encoder_fingerprint != encoder.fingerprint():
        raise ValueError(
            f"{key}: the latents in {dataset.folder} were made by another encoder than"
            f" {config.encoder}; wanted that one, or a cache made with this one"
        )


def _evaluation(
    model: nn.Module,
    encoder: Encoder,
    captions: CaptionSource | None,
    config: ExperimentConfig,
    runtime: Runtime,
) -> Callable[[Snapshot], Measured]:
    # As in `_grids`.
    from speedit_plugins.trainer.sampling.generator import SampleGenerator
    from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import given_conditions
    from speedit_plugins.trainer.training.evaluation import Evaluation

    generator = SampleGenerator(model, build.build_process(config, respaced=False), encoder, config)
    if config.super_resolution.factor:
        number = config.evaluate_samples
        conditions = given_conditions(config, generator, captions, num_samples=number)
    else:
        conditions = all_conditions(config, captions)
    return Evaluation(generator, conditions, config, runtime)
