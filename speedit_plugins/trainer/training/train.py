"""The phase train: joins the other processes, builds, resumes, trains, and prints where the results are."""

import gc
import os
from dataclasses import replace
from pathlib import Path

import yaml

from speedit_plugins.trainer import build, checkpoints, results
from speedit_plugins.trainer.accelerations.summary import in_use
from speedit_plugins.trainer.checkpoints.paths import named_checkpoint
from speedit_plugins.trainer.config.custom_imports import check_same_imports
from speedit_plugins.trainer.config.key_names import value_hint
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.summary import data_lines, skipped_line
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.logging.environment import save_environment
from speedit_plugins.trainer.logging.loggers import check_loggers, open_loggers
from speedit_plugins.trainer.logging.tracking import SilentTracker, Tracker, read_metrics
from speedit_plugins.trainer.parallel.peers import naming_lost
from speedit_plugins.trainer.parallel.runtime import Runtime, launch
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.data_centre import centred
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.products.choice import choose_products, describe
from speedit_plugins.trainer.training.saving.ending import run_to_end
from speedit_plugins.trainer.training.saving.run_lock import alone_in_folder
from speedit_plugins.trainer.training.trainer import Trainer


def train(config: ExperimentConfig) -> int:
    """Trains to `max_training_steps`, from a checkpoint if `resume` says so.

    All ranks call it. Rank 0 prints and writes files for all.
    """
    check_loggers(config)
    # Before anything slow, so that no signal during the start is lost.
    with StopRequest(is_launched=int(os.environ.get("WORLD_SIZE", "1")) > 1) as stop:
        runtime = launch(config)
        try:
            with naming_lost(runtime.peers):
                with alone_in_folder(config, runtime):
                    _train(config, runtime, stop)
                # Objects that hold the process group wait for peers when they are destroyed: do it first.
                gc.collect()
                runtime.barrier()
        except BaseException:
            # A notebook may train again. One of several processes would wait for the others here.
            if runtime.world_size == 1:
                runtime.close()
            raise
        runtime.close()
    return 0


def _train(config: ExperimentConfig, runtime: Runtime, stop: StopRequest) -> None:
    folder = Path(config.experiment_dir)
    resumed = checkpoint_to_resume(config, runtime)
    if resumed is not None:
        # Before a name is looked up that one of the imports may have registered.
        _check_imports(config, resumed)
    if config.pretrained is not None and (resumed is None or Path(config.pretrained).is_dir()):
        start = named_checkpoint(config.pretrained, "pretrained", say=say if runtime.is_main else None)
        config = replace(config, pretrained=str(start))
    config = centred(config, runtime, resumed)
    trainer = build_trainer(config, runtime, weights=None if resumed else config.pretrained)
    if resumed is not None:
        trainer.restore(resumed)
    else:
        choose_products(trainer.model, config, runtime, trainer.engine.template)
    if runtime.is_main:
        _introduce(trainer, resumed)
    # Skipped if nothing is trained: the files describe the run that made the weights.
    if runtime.is_main and trainer.step < config.max_training_steps:
        results.save_config(config, "train")
        save_environment(folder, runtime, linear_layers=describe(trainer.model))
    run_to_end(trainer, lambda: _to_the_end(trainer, stop))


def _to_the_end(trainer: Trainer, stop: StopRequest) -> None:
    """Trains, then prints how it went."""
    config, runtime, started = trainer.config, trainer.runtime, trainer.step
    if started < config.max_training_steps:
        with _tracker(config, trainer) as tracker:
            trainer.fit(tracker, stop)
    num_corrupt = runtime.gather_objects(getattr(trainer.loader.dataset, "num_corrupt", None))
    if runtime.is_main:
        if (line := skipped_line(num_corrupt)) is not None:
            say(line)
        _conclude(trainer, Path(config.experiment_dir), started=started, signal_name=stop.signal_name)


def _tracker(config: ExperimentConfig, trainer: Trainer) -> Tracker:
    if not trainer.runtime.is_main:
        return SilentTracker()
    return Tracker(
        Path(config.experiment_dir),
        total_steps=config.max_training_steps,
        start_step=trainer.step,
        loggers=open_loggers(config, start_step=trainer.step),
        only_few=config.board_scalars == "few",
    )


def checkpoint_to_resume(config: ExperimentConfig, runtime: Runtime | None = None) -> Path | None:
    """The checkpoint that `resume` asks for, with its files verified; None for a fresh start. Collective.

    `auto` takes the newest checkpoint that is not damaged, and prints a line for each damaged one. The folder
    of a run means its newest checkpoint.

    Raises:
        ValueError: steps of the run in `experiment_dir` would be lost, or the path is no checkpoint.
        CheckpointError: the named checkpoint is damaged, or with `auto` all of them are.
    """
    runtime = runtime or Runtime()
    folder = Path(config.experiment_dir) / results.CHECKPOINTS
    # What rank 0 sees in the folder counts.
    fault = None
    if runtime.is_main and folder.exists() and not folder.is_dir():
        fault = ValueError(f"experiment_dir: {folder} is a file; wanted a folder for checkpoints, or nothing")
    runtime.raise_together(fault)
    found = runtime.gather_objects(checkpoints.newest_first(folder))[0]
    if config.resume == "auto":
        return checkpoints.newest_whole(found, runtime)
    if config.resume == "never":
        if found:
            raise ValueError(
                f"resume: never would write over the run that holds {found[0]}; wanted another"
                " experiment_dir, or resume: auto"
            )
        return None
    if not (path := _named(config, runtime)).is_dir():
        near = value_hint(config.resume, ("auto", "never"))
        raise ValueError(f"resume needs auto, never or a checkpoint's folder, got {config.resume!r}{near}")
    if found and checkpoints.step_of(found[0]) > checkpoints.step_of(path):
        raise ValueError(
            f"resume: {path} goes back behind {found[0]} of the same run; wanted another experiment_dir for"
            " the branch, or resume: auto"
        )
    if reason := checkpoints.damage(path, runtime):
        raise checkpoints.CheckpointError(f"checkpoint {path} is damaged: {reason}")
    return path


def _named(config: ExperimentConfig, runtime: Runtime) -> Path:
    tell = say if runtime.is_main else None
    path = named_checkpoint(config.resume, "resume", run=Path(config.experiment_dir), say=tell)
    # A file in a checkpoint means the checkpoint: its weights alone are no state to go on from.
    return path.parent if path.is_file() and (path.parent / checkpoints.MANIFEST).is_file() else path


def _check_imports(config: ExperimentConfig, resumed: Path) -> None:
    saved = yaml.safe_load((resumed / checkpoints.CONFIG).read_text(encoding="utf-8"))
    try:
        check_same_imports(saved, config.custom_imports)
    except ValueError as error:
        raise checkpoints.CheckpointError(f"{resumed} cannot go on without its imports: {error}") from error


def _introduce(trainer: Trainer, resumed: Path | None) -> None:
    config, runtime = trainer.config, trainer.runtime
    if resumed is not None:
        is_read = config.pretrained is None or config.lora.rank
        ignored = "" if is_read else f"; {config.pretrained} is not read again"
        say(f"going on from {resumed}{ignored}")
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    where = f"{trainer.device.type}, {config.precision}"
    if runtime.world_size > 1:
        where += f", {runtime.world_size} processes, {config.plugin}"
    if runtime.sequence_size > 1:
        where += f", {runtime.sequence_size} of them on each sample"
    say(f"policy {trainer.policy}; {trained:,} trained parameters on {where}")
    if used := in_use(config):
        say(f"accelerations: {', '.join(used)}")
    for name, text in data_lines(trainer.loader.dataset, **build.summary_options(config)):
        say(f"{name}: {text}")


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
