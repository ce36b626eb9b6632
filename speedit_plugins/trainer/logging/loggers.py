"""TensorBoard and Weights & Biases behind one interface."""

import os
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Protocol

from speedit_plugins.files import naming, write_whole
from speedit_plugins.registry import raising_module
from speedit_plugins.trainer.config.loading import redact
from speedit_plugins.trainer.config.schema import ExperimentConfig

RUN_ID = "wandb_run_id"
_WRITER = "tensorboard"
_WITHOUT_KEY = ("offline", "disabled")


class Logger(Protocol):
    """Receives the finite scalars of a logged step. Names are paths: "train/loss"."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def close(self, *, is_failed: bool) -> None: ...


def check_loggers(config: ExperimentConfig) -> None:
    """Raises the errors of `open_loggers` early, before anything slow.

    Raises:
        ValueError: Weights & Biases is asked for without its package, or without a key where it needs one.
    """
    if not config.enable_wandb_log:
        return
    _import_wandb()
    if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in _WITHOUT_KEY:
        raise ValueError(
            "enable_wandb_log needs a key, got no WANDB_API_KEY in the environment; wanted it, or WANDB_MODE"
            f" one of {', '.join(_WITHOUT_KEY)}"
        )


def open_loggers(config: ExperimentConfig, *, start_step: int) -> list[Logger]:
    """The loggers that a config asks for, in `experiment_dir`. Call it on rank 0 only.

    Args:
        start_step: step at which this run starts. TensorBoard no longer shows later steps of earlier runs.

    Raises:
        ValueError: as `check_loggers`, or Weights & Biases refuses the run.
    """
    check_loggers(config)
    folder = Path(config.experiment_dir)
    folder.mkdir(parents=True, exist_ok=True)
    loggers: list[Logger] = []
    if config.enable_tensorboard_log:
        loggers.append(TensorBoardLogger(folder, start_step=start_step))
    if config.enable_wandb_log:
        loggers.append(WandbLogger(folder, config))
    return loggers


class TensorBoardLogger:
    """Event files in `folder/tensorboard`.

    Raises:
        OSError: the files cannot be written; names their folder.
    """

    def __init__(self, folder: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder / "tensorboard"
        # The thread writes as soon as there is a writer.
        self._previous_hook, threading.excepthook = threading.excepthook, self._leave_out_write_errors
        try:
            with naming(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=start_step + 1)
        except BaseException:
            threading.excepthook = self._previous_hook
            raise

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        with naming(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def close(self, *, is_failed: bool) -> None:
        # What an earlier write left fails again. Its error is being raised already.
        try:
            with suppress(OSError) if is_failed else naming(self._folder):
                self._writer.close()
        finally:
            threading.excepthook = self._previous_hook

    def _leave_out_write_errors(self, args: threading.ExceptHookArgs) -> None:
        """Prints no traceback of the writing thread: `add` raises its error again."""
        error = args.exc_value
        if not (isinstance(error, OSError) and str(raising_module(error)).startswith(_WRITER)):
            self._previous_hook(args)


class WandbLogger:
    """A run of Weights & Biases. An experiment's folder has one; a resumed training continues it.

    Raises:
        ValueError: Weights & Biases refuses the run, or cannot be reached.
    """

    def __init__(self, folder: Path, config: ExperimentConfig) -> None:
        wandb = _import_wandb()
        try:
            self._run = wandb.init(
                project=config.wandb_project,
                name=config.experiment_name or None,
                id=_run_id(folder),
                resume="allow",
                dir=folder,
                config=redact(asdict(config)),
                # Command line, terminal and repository may contain secrets that are redacted in the config.
                settings=wandb.Settings(console="off", disable_git=True, x_disable_meta=True),
            )
        except wandb.Error as error:
            raise ValueError(
                f"enable_wandb_log: Weights & Biases refused the run: {error};"
                " WANDB_MODE=offline works without it"
            ) from error
        # A run resumed after a crash logs some steps again. W&B's own step only rises and would drop them.
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self, *, is_failed: bool) -> None:
        self._run.finish(exit_code=int(is_failed))


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"enable_wandb_log needs the package wandb, which cannot be imported ({error}); wanted"
            " pip install 'speedit-plugins[wandb]', or enable_wandb_log: false"
        ) from error
    return wandb


def _run_id(folder: Path) -> str:
    """The id in the folder's file. The first call writes the file."""
    path = folder / RUN_ID
    if not path.exists():
        write_whole(path, uuid.uuid4().hex.encode())
    return path.read_text(encoding="utf-8").strip()
