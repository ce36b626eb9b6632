"""Checks what two ranks do when one of them fails; run by distributed_checks.py."""

import io
import math
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_runs import PLUGINS, TIMEOUT_SECONDS, everything, message_of, steps, two_ranks
from runs import file_size_limit, small_config
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.data.workers import DataError
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.parallel.runtime import Runtime, launch
from speedit_plugins.trainer.parallel.same_config import difference, stated
from speedit_plugins.trainer.results import LOCK
from speedit_plugins.trainer.training import train as train_phase
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.saving.ending import run_to_end
from speedit_plugins.trainer.training.saving.run_lock import alone_in_folder
from speedit_plugins.trainer.training.trainer import Trainer


def check_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(runtime: Runtime, folder: Path) -> None:
    for plugin in PLUGINS:
        trainer = steps(two_ranks(runtime, folder / plugin, plugin=plugin, max_skipped_steps=3), 2)
        good = trainer.save()
        before = everything(trainer)
        with poisoned(trainer, only_rank=1):
            result, _ = trainer.optimizer_step()
            assert result.is_skipped
            after = everything(trainer)
            for part in ("weights", "model", "ema", "ema_updates", "moments"):
                assert_close(after[part], before[part], rtol=0, atol=0)
            assert (trainer.step, trainer.num_skipped) == (3, 1)
            trainer.optimizer_step()
            wanted = (
                "3 steps in a row up to 5 were skipped, the last because a loss on rank 1 is not finite;"
                f" the last good checkpoint is {good}"
            )
            assert wanted in message_of(ValueError, trainer.optimizer_step)
        # One good step in between restarts the count.
        result, _ = trainer.optimizer_step()
        assert not result.is_skipped
        assert trainer._num_skipped_in_a_row == 0


def check_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(
    runtime: Runtime, folder: Path
) -> None:
    for plugin in PLUGINS:
        trainer = steps(two_ranks(runtime, folder / plugin, plugin=plugin), 1)
        before = everything(trainer)
        factor = math.nan if runtime.rank == 1 else 1.0
        # On an output, since fsdp2 computes with other tensors than the parameters that it shards.
        handle = trainer.model.blocks[0].mlp.fc1.register_full_backward_hook(
            lambda _, inputs, __, factor=factor: tuple(grad * factor for grad in inputs)
        )
        result, _ = trainer.optimizer_step()
        handle.remove()
        assert result.is_skipped, plugin
        after = everything(trainer)
        for part in ("weights", "model", "ema", "moments"):
            assert_close(after[part], before[part], rtol=0, atol=0)
        assert not trainer.optimizer_step()[0].is_skipped


def check_a_stop_asked_of_one_rank_stops_all_at_the_same_step(runtime: Runtime, folder: Path) -> None:
    trainer = two_ranks(runtime, folder, max_training_steps=1000)
    stop = StopRequest()
    if runtime.rank == 1:
        trainer.loader = Asking(trainer.loader, stop, after=3)  # type: ignore[assignment]  # replaces one for the test
    trainer.fit(SilentTracker(), stop)
    assert runtime.gather_objects(trainer.step) == [3, 3]
    assert checkpoints.newest(folder / "checkpoints") == folder / "checkpoints" / "step_0000003"


def check_a_full_disk_under_one_rank_fails_the_save_on_all_and_keeps_the_last(
    runtime: Runtime, folder: Path
) -> None:
    trainer = steps(two_ranks(runtime, folder, plugin="zero2"), 1)
    good = trainer.save()
    steps(trainer, 1)
    with file_size_limit(10_000 if runtime.rank == 1 else resource.RLIM_INFINITY):
        message = message_of(CheckpointError, trainer.save)
    assert "step_0000002 on rank 1: " in message
    assert f"the last checkpoint is {good}" in message
    runtime.barrier()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000001"]
    assert checkpoints.damage(good, runtime) is None
    # The run itself can continue, and saves once there is room again.
    assert steps(trainer, 1).save().name == "step_0000003"


def check_a_damaged_checkpoint_is_passed_over_by_auto_and_refused_by_name(
    runtime: Runtime, folder: Path
) -> None:
    options = {"model__class_dropout_prob": 0.0, "ckpt_every": 2}
    train_phase._train(small_config(folder, max_training_steps=4, **options), runtime, StopRequest())
    newest = folder / "checkpoints" / "step_0000004"
    if runtime.is_main:
        shard = newest / "optimizer_00001_of_00002.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
    runtime.barrier()
    named = small_config(folder / "other", max_training_steps=6, resume=newest)
    message = message_of(CheckpointError, lambda: train_phase._train(named, runtime, StopRequest()))
    assert re.search(r"step_0000004 is damaged: optimizer_00001_of_00002.safetensors has \d+ bytes", message)
    assert not (folder / "other" / "metrics.jsonl").exists()
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        train_phase._train(small_config(folder, max_training_steps=6, **options), runtime, StopRequest())
    if runtime.is_main:
        assert f"checkpoint {newest} is damaged" in said.getvalue()
        assert f"going on from {folder / 'checkpoints' / 'step_0000002'}" in said.getvalue()
    runtime.barrier()
    assert checkpoints.newest(folder / "checkpoints") == folder / "checkpoints" / "step_0000006"


def check_a_batch_that_one_rank_cannot_read_ends_all_after_a_checkpoint_of_the_last_whole_step(
    runtime: Runtime, folder: Path
) -> None:
    for plugin in PLUGINS:
        options = {"plugin": plugin, "max_training_steps": 10, "optimizer__grad_accumulation": 2}
        whole = two_ranks(runtime, folder / plugin / "whole", **options)
        broken = two_ranks(runtime, folder / plugin / "broken", **options)
        # The second batch of the fourth step.
        broken.loader = Breaking(broken.loader, runtime, only_rank=1, after=8)  # type: ignore[assignment]  # replaces one
        message = message_of(DataError, partial(run_to_end, broken, partial(_fit, broken)))
        saved = folder / plugin / "broken" / "checkpoints" / "step_0000003"
        assert message == f"sample 7 is broken (on rank 1); step 3 is saved as {saved}", message
        assert runtime.gather_objects(message) == [message, message]
        # What it saved goes on as the run that met no fault.
        resumed = two_ranks(runtime, folder / plugin / "broken", **options)
        resumed.restore(saved)
        steps(resumed, 2)
        steps(whole, 5)
        assert_close(everything(resumed), everything(whole), rtol=0, atol=0)


def check_ranks_with_different_configs_or_versions_are_refused_on_all(runtime: Runtime, folder: Path) -> None:
    base: dict[str, Any] = {"optimizer__lr": 1e-4, "seed": 0, "precision": "fp32"}
    others = {
        "optimizer.lr 0.0001 on rank 0, 0.001 on rank 1": {"optimizer__lr": 1e-3},
        "seed 0 on rank 0, 1 on rank 1": {"seed": 1},
        "data.batch_size 16 on rank 0, 32 on rank 1": {"data__batch_size": 32},
        "precision 'fp32' on rank 0, 'bf16' on rank 1": {"precision": "bf16"},
        "resume 'auto' on rank 0, 'never' on rank 1": {"resume": "never"},
        "diffusion.policy.type 'speedit' on rank 0, 'speed' on rank 1": {
            "diffusion__policy": "{type: speed}"
        },
        "diffusion.policy.k nothing on rank 0, 3.0 on rank 1": {
            "diffusion__policy": "{type: speedit, k: 3.0}"
        },
        "max_training_steps 20 on rank 0, 30 on rank 1; 1 more keys differ": {
            "max_training_steps": 30,
            "ckpt_every": 7,
        },
    }
    for wanted, changes in others.items():
        config = small_config(folder, **(base | (changes if runtime.rank == 1 else {})))
        found = difference(runtime.gather_objects(stated(config)))
        assert found == f"the processes of a run need one config, got {wanted}", found
    # A machine has its own copy of the data, and its own cores.
    own = small_config(folder, data__num_workers=runtime.rank, **base)
    assert difference(runtime.gather_objects(stated(own))) is None
    other = {**stated(own), "speedit-plugins": f"1.{runtime.rank}"}
    need = "the processes of a run need one version of speedit-plugins"
    assert difference(runtime.gather_objects(other)) == (
        f"{need}, got speedit-plugins '1.0' on rank 0, '1.1' on rank 1"
    )
    older = stated(own) if runtime.rank else [Path("checkpoints")]
    found = difference(runtime.gather_objects(older))
    assert found == f"{need}, rank 1 has another than rank 0"


def check_a_folder_with_a_training_is_refused_on_all(runtime: Runtime, folder: Path) -> None:
    config = small_config(folder)
    held = None
    if runtime.is_main:
        # Another process: a record lock does not keep its own out.
        lock = "f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
        code = f"import fcntl, sys; {lock}; print(flush=True); input()"
        folder.mkdir(parents=True)
        held = subprocess.Popen(
            [sys.executable, "-c", code, folder / LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert held.stdout is not None
        held.stdout.readline()

    def enter() -> None:
        with alone_in_folder(config, runtime):
            pass

    message = message_of(ValueError, enter)
    assert message.startswith(f"another training is in experiment_dir {folder}: an unknown process; wanted")
    if held is not None:
        held.kill()
        held.wait()
    enter()


def check_ranks_wait_as_long_as_the_config_says(runtime: Runtime, folder: Path) -> None:
    gloo = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    assert gloo.options._timeout == timedelta(seconds=TIMEOUT_SECONDS)


def check_a_folder_that_cannot_be_written_fails_on_all(runtime: Runtime, folder: Path) -> None:
    trainer = two_ranks(runtime, Path("/proc/nowhere"))
    assert "cannot write checkpoint /proc/nowhere" in message_of(CheckpointError, trainer.save)


def check_a_batch_that_ranks_cannot_share_is_refused(runtime: Runtime, folder: Path) -> None:
    config = small_config(folder)
    message = message_of(
        ValueError, lambda: launch(replace(config, data=replace(config.data, batch_size=15)))
    )
    assert "wanted a multiple of 2 processes, got 15" in message


def _fit(trainer: Trainer) -> None:
    trainer.fit(SilentTracker(), StopRequest())


class Breaking:
    """A loader that cannot read its batch number `after` on one rank."""

    def __init__(self, loader: Any, runtime: Runtime, *, only_rank: int, after: int) -> None:
        self._loader, self._left = loader, after if runtime.rank == only_rank else -1

    def __next__(self) -> Any:
        self._left -= 1
        if self._left == 0:
            raise DataError("sample 7 is broken")
        return next(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class Asking:
    """A loader during whose batch number `after` a signal arrives."""

    def __init__(self, loader: Any, stop: StopRequest, *, after: int) -> None:
        self._loader, self._stop, self._left = loader, stop, after

    def __next__(self) -> Any:
        self._left -= 1
        if self._left == 0:
            self._stop.signal_name = "SIGTERM"
        return next(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


@contextmanager
def poisoned(trainer: Trainer, *, only_rank: int) -> Iterator[None]:
    encode = trainer.inputs.encoder.encode
    factor = math.nan if trainer.runtime.rank == only_rank else 1.0
    trainer.inputs.encoder.encode = lambda images, generators: encode(images, generators) * factor  # type: ignore[method-assign]  # for the test
    try:
        yield
    finally:
        trainer.inputs.encoder.encode = encode  # type: ignore[method-assign]  # restored
