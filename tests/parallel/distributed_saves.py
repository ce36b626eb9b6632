"""Checks of checkpoints that two ranks write while they go on; run by distributed_checks.py."""

import resource
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_faults import Asking
from distributed_runs import PLUGINS, everything, message_of, steps, two_ranks
from held_saves import files, held_back
from runs import file_size_limit
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.checkpoints import CheckpointError
from speedit_plugins.trainer.checkpoints.best import read_best
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.interrupt import StopRequest
from speedit_plugins.trainer.training.saving import background_saves
from speedit_plugins.trainer.training.saving.background_saves import BackgroundSaves


def check_a_save_while_the_ranks_go_on_has_the_files_of_one_that_they_wait_for(
    runtime: Runtime, folder: Path
) -> None:
    for plugin in PLUGINS:
        waited = steps(two_ranks(runtime, folder / plugin / "waited", plugin=plugin), 2)
        expected = waited.save()
        trainer = steps(two_ranks(runtime, folder / plugin / "run", plugin=plugin, async_save="true"), 2)
        with held_back():
            path = trainer.save()
            # The ranks exchange gradients, and everything that is saved changes before it is written.
            steps(trainer, 2)
            assert not path.exists()
            trainer.saves.wait()
        assert runtime.gather_objects(trainer.saves.last) == [path, path]
        assert files(path) == files(expected), plugin
        assert checkpoints.damage(path, runtime) is None
        # It goes on as the run that was never interrupted.
        resumed = two_ranks(runtime, folder / plugin / "run", plugin=plugin, async_save="true")
        resumed.restore(path)
        assert_close(everything(steps(resumed, 2)), everything(trainer), rtol=0, atol=0)


def check_a_stop_asked_of_one_rank_waits_for_the_save_in_flight(runtime: Runtime, folder: Path) -> None:
    options = {"plugin": "fsdp2", "async_save": "true", "max_training_steps": 1000, "ckpt_every": 2}
    trainer, stop = two_ranks(runtime, folder, **options), StopRequest()
    if runtime.rank == 1:
        trainer.loader = Asking(trainer.loader, stop, after=3)  # type: ignore[assignment]  # replaces one for the test
    with held_back():
        trainer.fit(SilentTracker(), stop)
        found = checkpoints.newest_first(folder / "checkpoints")
        assert [checkpoints.step_of(path) for path in found] == [3, 2]
        assert [checkpoints.damage(path, runtime) for path in found] == [None, None]
        best = trainer.saves.note_best(3, "fid", 2.0)
        assert runtime.gather_objects(read_best(folder / "checkpoints")) == [None, None]
        trainer.saves.wait()
    assert read_best(folder / "checkpoints") == best


def check_a_full_disk_under_one_rank_is_an_error_of_the_next_step_on_all(
    runtime: Runtime, folder: Path
) -> None:
    trainer = steps(two_ranks(runtime, folder, plugin="zero2", async_save="true"), 1)
    good = trainer.save()
    steps(trainer, 1)
    trainer.saves.wait()
    with file_size_limit(10_000 if runtime.rank == 1 else resource.RLIM_INFINITY):
        trainer.save()
        if runtime.rank == 1:
            # Rank 0 may hear of it first in the step.
            trainer.saves._background.wait()  # type: ignore[attr-defined]  # that of saves in the background
        message = message_of(CheckpointError, trainer.optimizer_step)
    assert "step_0000002 on rank 1: cannot write " in message, message
    assert "optimizer_00001_of_00002.safetensors: File too large; " in message, message
    assert message.endswith(f"the last checkpoint is {good}"), message
    assert runtime.gather_objects((message, trainer.step)) == [(message, 2)] * 2
    runtime.barrier()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_0000001"]
    # The run itself can continue, and saves once there is room again.
    path = steps(trainer, 1).save()
    trainer.saves.wait()
    assert checkpoints.damage(path, runtime) is None


def check_a_rank_that_fails_alone_is_an_error_of_all(runtime: Runtime, folder: Path) -> None:
    for place in ("step", "wait"):
        _fail_alone(runtime, folder / place, place)


def _fail_alone(runtime: Runtime, folder: Path, place: str) -> None:
    """The others hear of it in the next step, or where all of them wait for the save."""
    trainer = steps(two_ranks(runtime, folder, async_save="true"), 1)
    saves, end = trainer.saves, threading.Event()
    assert isinstance(saves, BackgroundSaves)

    def write(*given: object) -> None:
        if runtime.rank == 1:
            raise MemoryError
        # As in an exchange, for the rank that does not come.
        end.wait()

    saves._write = write  # type: ignore[assignment,method-assign]  # for the test
    patience, background_saves._FAILURE_SECONDS = background_saves._FAILURE_SECONDS, 0.1
    trainer.save()
    if runtime.rank == 1:
        saves._background.wait()
    reach = {"step": trainer.optimizer_step, "wait": saves.wait}[place]
    message = message_of(CheckpointError, reach)
    assert message == f"cannot write checkpoint {folder}/checkpoints/step_0000001 on rank 1: MemoryError"
    # Nobody waits for rank 0's thread: at the end, or in another save.
    assert saves._background.is_busy == runtime.is_main
    saves.settle()
    assert message_of(CheckpointError, trainer.save) == message
    background_saves._FAILURE_SECONDS = patience
    end.set()


def check_the_ranks_of_saves_in_the_background_have_collectives_of_their_own(
    runtime: Runtime, folder: Path
) -> None:
    apart = runtime.apart(30.0)
    assert apart.gather_objects(apart.rank) == [0, 1]
    parts = apart.gather(torch.full((2,), float(apart.rank)))
    assert [part.tolist() for part in parts] == ([[0.0, 0.0], [1.0, 1.0]] if apart.is_main else [])
    assert apart.maximum([float(apart.rank)]) == [1.0]
    assert apart.group is not dist.group.WORLD
    assert dist.get_backend(apart.group) == "gloo"
