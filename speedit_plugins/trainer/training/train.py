"""The phase train: join the other processes, build, resume, train, and say where the results lie."""

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.registry import MASKS
from speedit_plugins.registry import build as build_registered
from speedit_plugins.trainer import build, checkpoint, results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import ResumableLoader, SampleSource
from speedit_plugins.trainer.inputs import BatchEncoder, Encoder
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.logging.environment import save_environment
from speedit_plugins.trainer.logging.loggers import check_boards, open_boards
from speedit_plugins.trainer.logging.throughput import mfu_of
from speedit_plugins.trainer.logging.timestep_profile import build_profiler
from speedit_plugins.trainer.logging.tracking import SilentTracker, Tracker, read_metrics
from speedit_plugins.trainer.models.pretrained import load_weights, read_checkpoint
from speedit_plugins.trainer.models.text import CaptionSource
from speedit_plugins.trainer.parallel.booster import build_engine
from speedit_plugins.trainer.parallel.runtime import Runtime, build_device, launch
from speedit_plugins.trainer.sampling.conditions import build_captions, grid_conditions
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.grids import draw_grid
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.data_centre import centred
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.trainer import Trainer, TrainingParts


def train(config: ExperimentConfig) -> int:
    """Trains to `max_training_steps`, going on from a checkpoint as `resume` says.

    Every rank of a launcher calls it; rank 0 speaks and writes for all.
    """
    check_boards(config)
    # Before anything slow, so that a signal during the start is not lost.
    with StopRequest(is_launched=int(os.environ.get("WORLD_SIZE", "1")) > 1) as stop:
        runtime = launch(config)
        _train(config, runtime, stop)
        # What holds the process group must be gone before the group is: its destructors wait for peers.
        gc.collect()
        runtime.barrier()
        runtime.close()
    return 0


def _train(config: ExperimentConfig, runtime: Runtime, stop: StopRequest) -> None:
    folder = Path(config.experiment_dir)
    resumed = checkpoint_to_resume(config, runtime)
    config = centred(config, runtime, resumed)
    trainer = build_trainer(config, runtime, weights=None if resumed else config.pretrained)
    if resumed is not None:
        trainer.restore(resumed)
    started = trainer.step
    if runtime.is_main:
        results.save_config(config, "train")
        save_environment(folder, runtime)
        _introduce(trainer, resumed)
    if started < config.max_training_steps:
        with _tracker(config, trainer) as tracker:
            trainer.fit(tracker, stop)
    if runtime.is_main:
        _conclude(trainer, folder, started=started, signal_name=stop.signal_name)


def _tracker(config: ExperimentConfig, trainer: Trainer) -> Tracker:
    if not trainer.runtime.is_main:
        return SilentTracker()
    return Tracker(
        Path(config.experiment_dir),
        total_steps=config.max_training_steps,
        start_step=trainer.step,
        boards=open_boards(config, start_step=trainer.step),
    )


def build_trainer(
    config: ExperimentConfig, runtime: Runtime | None = None, *, weights: str | None = None
) -> Trainer:
    """The trainer of a config, before its first step; seeds torch's global generator.

    Args:
        runtime: None is a lone process.
        weights: file or checkpoint folder that the model starts from, as `pretrained`.
    """
    runtime = runtime or Runtime(device=build_device(config))
    # The same on all ranks, so that they build the same model.
    torch.manual_seed(config.seed)
    encoder = build.build_encoder(config, runtime.device)
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
    loader = ResumableLoader(
        dataset,
        batch_size=config.data.batch_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        prefetch_factor=config.data.prefetch_factor,
        pin_memory=runtime.device.type == "cuda",
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    policy = build.build_timestep_policy(config, process)
    engine = build_engine(model, config, runtime)
    inputs = BatchEncoder(
        encoder,
        runtime.device,
        is_labelled=config.num_classes > 0,
        captions=captions,
        null_text=None if captions is None else cast(Mapping[str, Tensor], model.null_text),
        caption_dropout_prob=config.caption_dropout_prob,
        masks=None if config.inpainting is None else build_registered(MASKS, config.inpainting),
    )
    profiler = None
    if config.profile_every and runtime.is_main:
        profiler = build_profiler(
            model, process, policy, inputs, dataset, config, world_size=runtime.world_size
        )
    parts = TrainingParts(engine, inputs, process, policy, loader, runtime, mfu, profiler)
    if not config.sample_every:
        return Trainer(parts, config)
    generator = SampleGenerator(model, build.build_process(config, respaced=False), encoder, config)
    conditions = grid_conditions(config, captions)

    def draw(averages: Mapping[str, Tensor], step: int) -> None:
        path = Path(config.experiment_dir) / results.GRIDS / f"step_{step:07d}.png"
        draw_grid(generator, conditions, path, weights=averages)

    return Trainer(parts, config, draw_grid=draw)


def checkpoint_to_resume(config: ExperimentConfig, runtime: Runtime | None = None) -> Path | None:
    """The checkpoint that `resume` names, its files verified; None for a fresh start. Collective.

    `auto` passes over damaged checkpoints, saying so, to the newest whole one.

    Raises:
        ValueError: steps of the run in `experiment_dir` would be lost.
        CheckpointError: the named checkpoint is damaged, or under `auto` all of them are.
    """
    runtime = runtime or Runtime()
    # As rank 0 sees the folder.
    found = runtime.gather_objects(
        checkpoint.newest_first(Path(config.experiment_dir) / results.CHECKPOINTS)
    )[0]
    if config.resume == "auto":
        return checkpoint.newest_whole(found, runtime)
    if config.resume == "never":
        if found:
            raise ValueError(
                f"resume: never would write over the run that holds {found[0]}; wanted another"
                " experiment_dir, or resume: auto"
            )
        return None
    path = Path(config.resume)
    if not path.is_dir():
        raise ValueError(f"resume needs auto, never or a checkpoint's folder, got {config.resume!r}")
    if found and checkpoint.step_of(found[0]) > checkpoint.step_of(path):
        raise ValueError(
            f"resume: {path} goes back behind {found[0]} of the same run; wanted another experiment_dir for"
            " the branch, or resume: auto"
        )
    if reason := checkpoint.damage(path, runtime):
        raise checkpoint.CheckpointError(f"checkpoint {path} is damaged: {reason}")
    return path


def _check_cache(dataset: SampleSource, encoder: Encoder, config: ExperimentConfig) -> None:
    if isinstance(dataset, LatentCache) and dataset.encoder_fingerprint != encoder.fingerprint():
        raise ValueError(
            f"data.dataset: the latents in {config.data.dataset['root']} were made by another encoder than"
            f" {config.encoder}; wanted that one, or a cache made with this one"
        )


def _load_pretrained(
    model: torch.nn.Module, path: str, captions: CaptionSource | None, runtime: Runtime
) -> None:
    source = Path(path) / checkpoint.EMA if Path(path).is_dir() else Path(path)
    # Another set of classes is the usual reason to fine-tune: label embeddings may differ. The empty caption
    # is that of the run's own text encoder.
    named = (*model.state_dict(), *read_checkpoint(source))
    prefixes = ("y_embedder.", "null_tokens", "null_mask")
    excused = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in named)]
    report = load_weights(model, source, allow_mismatch=excused)
    if captions is not None:
        cast(Any, model).set_null_text(captions.encode([""]))
    if runtime.is_main:
        fresh = f"; freshly initialised: {', '.join(report.left_at_init)}" if report.left_at_init else ""
        say(f"fine-tuning from {path}: {len(report.loaded)} tensors{fresh}")


def _introduce(trainer: Trainer, resumed: Path | None) -> None:
    config, runtime = trainer.config, trainer.runtime
    if resumed is not None:
        ignored = "" if config.pretrained is None else f"; {config.pretrained} is not read again"
        say(f"going on from {resumed}{ignored}")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    where = f"{trainer.device.type}, {config.precision}"
    if runtime.world_size > 1:
        where += f", {runtime.world_size} processes, {config.plugin}"
    say(f"policy {trainer.policy}; {trained:,} trained parameters on {where}")


def _conclude(trainer: Trainer, folder: Path, *, started: int, signal_name: str | None) -> None:
    config = trainer.config
    rows = read_metrics(folder)
    if rows:
        title = f"{config.experiment_name or folder}: policy {trainer.policy.name}"
        images.save_loss_curve(rows, folder / results.LOSS_CURVE, title=title)
    if started >= config.max_training_steps:
        say(f"nothing to train: the run is at step {started}, max_training_steps {config.max_training_steps}")
    elif trainer.step < config.max_training_steps:
        say(f"stopped by {signal_name or 'a signal to another process'} after step {trainer.step}")
        say("run the same command again to go on from the checkpoint (resume: auto)")
    else:
        skipped = f", {trainer.num_skipped} steps skipped" if trainer.num_skipped else ""
        say(f"trained to step {trainer.step}{skipped}")
    results.say_where(folder)
