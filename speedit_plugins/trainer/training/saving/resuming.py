"""Restores optimizer and average from a checkpoint, also if the config now names another one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speedit_plugins.trainer.checkpoints import Saved
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.sections import EmaConfig, label
from speedit_plugins.trainer.config.validation import build_section
from speedit_plugins.trainer.parallel.replica import Engine
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say
from speedit_plugins.trainer.training.averages.ema import Average
from speedit_plugins.trainer.training.averages.snapshots import check_no_snapshots


def restore_optimizer(
    engine: Engine, saved: Saved, was: Mapping[str, Any], config: ExperimentConfig, runtime: Runtime
) -> None:
    """Restores the optimizer's state. One of another type begins anew, and a line says so.

    Args:
        was: plain config of the checkpoint; before other optimizers existed it was AdamW.

    Raises:
        ValueError: the state does not fit the optimizer.
    """
    options = was.get("optimizer", {})
    before, now = options.get("type", "AdamW"), config.optimizer.type
    if before == now:
        _check_fixed(options, config)
        engine.load_moments(saved.moments, saved.state.get("optimizer", {}))
    elif runtime.is_main:
        say(f"the optimizer was {before} and is {now}: its state begins anew, the weights go on")


def _check_fixed(was: Mapping[str, Any], config: ExperimentConfig) -> None:
    facts = OPTIMIZER_FACTS.get(config.optimizer.type)
    if facts is None:
        return
    for name in facts.fixed:
        default = facts.parameters[name]
        before, now = was.get(name, default), config.optimizer.parameters.get(name, default)
        if before != now:
            raise ValueError(f"optimizer.{name} was {before}, got {now}; it decides the shape of the state")


def restore_average(
    average: Average, saved: Saved, was: Mapping[str, Any], config: ExperimentConfig, runtime: Runtime
) -> None:
    """Restores the average. If the checkpoint has none, it begins with the weights, and a line says so.

    Raises:
        ValueError: the checkpoint has an average of another kind, or not of this length; or a power average
            begins in a folder with snapshots of an earlier one.
    """
    before, now = build_section(EmaConfig, was.get("ema", {}), "ema"), config.ema
    updates = saved.state["ema_updates"]
    if now.type == "none":
        average.load({}, updates)
        if before.type != "none" and runtime.is_main:
            say("ema.type is none: the average of the checkpoint is not continued")
    elif before.type == "none":
        _begin(average, saved, config, runtime)
    elif before.type != now.type:
        raise ValueError(f"ema.type was {before.type}, got {now.type}; wanted the same, or none")
    elif now.type == "power":
        found = {label(before.sigma_rel[0]): saved.ema, **saved.averages}
        wanted = [label(sigma_rel) for sigma_rel in now.sigma_rel]
        if not set(wanted) <= set(found):
            raise ValueError(
                f"ema.sigma_rel was {before.sigma_rel}, got {now.sigma_rel}; wanted some of these"
            )
        average.load(found[wanted[0]], updates, found)
    else:
        average.load(saved.ema, updates)


def _begin(average: Average, saved: Saved, config: ExperimentConfig, runtime: Runtime) -> None:
    """Begins an average with the weights of a checkpoint that has none."""
    kind = config.ema.type
    if kind == "power":
        # Also where this run writes none: a later one may.
        check_no_snapshots(Path(config.experiment_dir))
    average.load(saved.model, 0)
    if runtime.is_main:
        say(f"the checkpoint has no average: ema.type {kind} begins with its weights")
