"""Trainers on two ranks, or on each rank by itself, for the checks that distributed_checks.py runs."""

import json
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from runs import small_config
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel import master_weights
from speedit_plugins.trainer.parallel.runtime import Runtime, sharing_samples
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

# Longer than the default, so that tests can tell them apart.
TIMEOUT_SECONDS = 900.0
PLUGINS = ("ddp", "zero1", "zero2", "fsdp2")
# Softmax does not see a key's bias, so its gradient is zero in exact arithmetic. AdamW divides the rounding
# error by its own size. So two orders of summation drift apart there, by the learning rate at each step.
KEY_BIAS = ".attn.qkv.bias"


def run_checks(checks: Mapping[str, Callable[[Runtime, Path], None]], runtime: Runtime, out: Path) -> None:
    """Calls each check on all ranks, with a folder of its own, and leaves the process group."""
    results = {}
    for name, check in checks.items():
        failure = ""
        try:
            check(runtime, out / name)
        except Exception:
            failure = traceback.format_exc()
        failures = runtime.gather_objects(failure)
        results[name] = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
        if runtime.is_main:
            # Written after each check, so that results are kept if the job ends early.
            (out / "results.json").write_text(json.dumps(results, indent=1))
    runtime.close()


def two_ranks(runtime: Runtime, folder: Path, **changes: Any) -> Trainer:
    options = {
        "model__class_dropout_prob": 0.0,
        "optimizer__lr": 1e-3,
        "optimizer__warmup_steps": 0,
        **changes,
    }
    config = small_config(folder, **options)
    return build_trainer(config, grouped(runtime, config))


def grouped(runtime: Runtime, config: ExperimentConfig) -> Runtime:
    """The runtime with the groups of the config; those of two trainers are made once."""
    size = config.sequence_parallel
    if size == 1:
        return replace(runtime, sequence_size=1, sequence_group=None)
    return runtime if runtime.sequence_size == size else sharing_samples(runtime, config)


def alone(folder: Path, **changes: Any) -> Trainer:
    """The same trainer in each process by itself."""
    return two_ranks(Runtime(), folder, **changes)


def steps(trainer: Trainer, count: int) -> Trainer:
    trainer.engine.model.train()
    for _ in range(count):
        trainer.optimizer_step()
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The whole master weights on rank 0, without the key biases."""
    slices = master_weights.owned(trainer.engine.masters, trainer.runtime)
    shapes = {master.name: master.shape for master in trainer.engine.masters}
    return without_key_bias(master_weights.gather(slices, shapes, trainer.runtime))


def without_key_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, value in tensors.items():
        value = value.clone()
        if name.endswith(KEY_BIAS):
            query, key, rest = value.chunk(3)
            value = torch.cat([query, rest])
        found[name] = value
    return found


def everything(trainer: Trainer) -> dict[str, Any]:
    """Everything on this rank that decides the next step, whose draws it begins."""
    trainer.draws.begin(trainer.step)
    parts = master_weights.owned(trainer.engine.masters, trainer.runtime)
    engine = trainer.engine
    moments = master_weights.optimizer_slices(engine.optimizer, engine.masters, trainer.runtime)
    return {
        "weights": {name: part.values for name, part in parts.items()},
        # Under fsdp2 this rank's rows.
        "model": {k: getattr(v, "to_local", lambda v=v: v)() for k, v in trainer.model.state_dict().items()},
        "ema": {name: part.values for name, part in trainer.ema.slices.items()},
        "ema_updates": trainer.ema.num_updates,
        "moments": {name: part.values for name, part in moments.items()},
        "lr": trainer.engine.optimizer.param_groups[0]["lr"],
        "scaler": trainer.engine.scaler_state(),
        "step": trainer.step,
        # The identity is text, which assert_close does not compare.
        "loader": {key: value for key, value in trainer.loader.state_dict().items() if key != "identity"},
        "next_batch": next(trainer.loader),
        "next_timesteps": trainer.policy.draw_at(trainer.draws.quantiles).index,
    }


def message_of(kind: type[Exception], action: Callable[[], Any]) -> str:
    try:
        action()
    except kind as error:
        return str(error)
    raise AssertionError(f"no {kind.__name__} was raised")
