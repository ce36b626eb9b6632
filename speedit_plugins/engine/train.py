"""The phase train: build, resume, train, and say where the results lie."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.data.loader import ResumableLoader
from speedit_plugins.engine import build, checkpoint, pictures, results
from speedit_plugins.engine.generate import ImageGenerator, draw_grid
from speedit_plugins.engine.interrupt import StopRequest
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.engine.tracking import Tracker, read_metrics, say
from speedit_plugins.engine.trainer import Trainer, TrainingParts
from speedit_plugins.models.pretrained import load_weights, read_checkpoint


def train(config: ExperimentConfig) -> int:
    """Trains to `max_training_steps`, going on from a checkpoint as `resume` says."""
    folder = Path(config.experiment_dir)
    with StopRequest() as stop:
        resumed = checkpoint_to_resume(config)
        trainer = build_trainer(config)
        if resumed is not None:
            trainer.restore(resumed)
            ignored = "" if config.pretrained is None else f"; {config.pretrained} is not read again"
            say(f"going on from {resumed}{ignored}")
        elif config.pretrained is not None:
            _load_pretrained(trainer, config.pretrained)
        results.save_config(config, "train")
        started = trainer.step
        trained = sum(p.numel() for p in trainer.parameters)
        say(f"policy {trainer.policy}; {trained:,} trained parameters on {trainer.device}")
        with Tracker(
            folder,
            total_steps=config.max_training_steps,
            start_step=trainer.step,
            tensorboard=config.enable_tensorboard_log,
        ) as tracker:
            trainer.fit(tracker, stop)
    rows = read_metrics(folder)
    if rows:
        title = f"{config.experiment_name or folder}: policy {trainer.policy.name}"
        pictures.save_loss_curve(rows, folder / results.LOSS_CURVE, title=title)
    if started >= config.max_training_steps:
        say(f"nothing to train: the run is at step {started} of {config.max_training_steps}")
    elif trainer.step < config.max_training_steps:
        say(f"stopped by {stop.signal_name} after step {trainer.step}")
        say("run the same command again to go on from the checkpoint (resume: auto)")
    else:
        say(f"trained {trainer.step} steps")
    results.say_where(folder)
    return 0


def build_trainer(config: ExperimentConfig) -> Trainer:
    """The trainer of a config, before its first step; seeds torch's global generator."""
    torch.manual_seed(config.seed)
    device = build.build_device(config)
    encoder = build.build_encoder(config, device)
    model = build.build_model(config, encoder).to(device)
    process = build.build_process(config, respaced=True)
    loader = ResumableLoader(
        build.build_dataset(config),
        batch_size=config.data.batch_size,
        seed=config.seed,
        num_workers=config.data.num_workers,
        pin_memory=device.type == "cuda",
    )
    policy = build.build_timestep_policy(config, process)
    parts = TrainingParts(model, encoder, process, policy, loader, device)
    if not config.sample_every:
        return Trainer(parts, config)
    generator = ImageGenerator(model, build.build_process(config, respaced=False), encoder, config)

    def draw(weights: Mapping[str, Tensor], step: int) -> None:
        path = Path(config.experiment_dir) / results.GRIDS / f"step_{step:07d}.png"
        draw_grid(generator, path, weights=weights)

    return Trainer(parts, config, draw_grid=draw)


def checkpoint_to_resume(config: ExperimentConfig) -> Path | None:
    """The checkpoint that `resume` names; None for a fresh start.

    Raises:
        ValueError: steps of the run in `experiment_dir` would be lost.
    """
    found = checkpoint.newest(Path(config.experiment_dir) / results.CHECKPOINTS)
    if config.resume == "auto":
        return found
    if config.resume == "never":
        if found is not None:
            raise ValueError(
                f"resume: never would write over the run that holds {found}; wanted another experiment_dir,"
                " or resume: auto"
            )
        return None
    path = Path(config.resume)
    if not path.is_dir():
        raise ValueError(f"resume needs auto, never or a checkpoint's folder, got {config.resume!r}")
    if found is not None and checkpoint.step_of(found) > checkpoint.step_of(path):
        raise ValueError(
            f"resume: {path} goes back behind {found} of the same run; wanted another experiment_dir for the"
            " branch, or resume: auto"
        )
    return path


def _load_pretrained(trainer: Trainer, path: str) -> None:
    source = Path(path) / checkpoint.EMA if Path(path).is_dir() else Path(path)
    # Another set of classes is the usual reason to fine-tune: label embeddings may differ.
    named = (*trainer.model.state_dict(), *read_checkpoint(source))
    excused = ("y_embedder.",) if any(name.startswith("y_embedder.") for name in named) else ()
    report = load_weights(trainer.model, source, allow_mismatch=excused)
    trainer.ema.load(dict(trainer.model.named_parameters()), num_updates=0)
    fresh = f"; freshly initialised: {', '.join(report.left_at_init)}" if report.left_at_init else ""
    say(f"fine-tuning from {path}: {len(report.loaded)} tensors{fresh}")
