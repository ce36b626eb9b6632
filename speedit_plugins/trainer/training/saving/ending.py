"""How a training ends before its last step: what is saved then, and what the last line says is lost."""

import signal
from collections.abc import Callable

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.data.workers import DataError
from speedit_plugins.trainer.results import CHECKPOINTS
from speedit_plugins.trainer.training.interrupt import Interrupted
from speedit_plugins.trainer.training.trainer import Trainer


def run_to_end(trainer: Trainer, action: Callable[[], None]) -> None:
    """Calls `action`, the rest of a training. If it ends early, the error says what is kept. Collective.

    Raises:
        DataError: a batch cannot be read. The last whole step is saved before.
        Interrupted: a second signal arrived.
    """
    try:
        action()
    except DataError as fault:
        raise DataError(f"{fault}; {_saved(trainer)}") from fault
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Interrupted) else signal.SIGINT
        raise Interrupted(f"interrupted at step {trainer.step}; {_lost(trainer)}", number) from error


def _saved(trainer: Trainer) -> str:
    last = trainer.runtime.gather_objects(_last_step(trainer))[0]
    if trainer.step <= last:
        return f"the last checkpoint is {_place(trainer)}"
    if trainer.step == 0:
        return "there is nothing to save"
    try:
        path = trainer.save()
        trainer.saves.wait()
        return f"step {trainer.step} is saved as {path}"
    except ValueError as error:
        return f"step {trainer.step} is not saved: {error}"


def _lost(trainer: Trainer) -> str:
    last = _last_step(trainer)
    if last < 0:
        return "there is no checkpoint of this run, so all of it is lost"
    lost = trainer.step - last
    what = "nothing is lost" if lost <= 0 else f"{lost} step{'s' if lost > 1 else ''} since then lost"
    return f"the last checkpoint is {_place(trainer)}, {what}"


def _last_step(trainer: Trainer) -> int:
    """The step of the run's newest checkpoint; -1 without one."""
    newest = checkpoints.newest(trainer.folder / CHECKPOINTS)
    return -1 if newest is None else checkpoints.step_of(newest)


def _place(trainer: Trainer) -> str:
    return str(checkpoints.newest(trainer.folder / CHECKPOINTS))
