"""TensorBoard and Weights & Biases behind one interface."""

import os
import threading
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Protocol

from PIL import Image

from speedit_plugins.files import naming, write_whole
from speedit_plugins.registry import raising_module
from speedit_plugins.trainer.config.loading import redact
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.validation import as_plain

RUN_ID, TENSORBOARD = "wandb_run_id", "tensorboard"
_WRITER = "tensorboard"
_WITHOUT_KEY = ("offline", "disabled")


class Logger(Protocol):
    """Receives the finite scalars of a logged step, and image files. Names are paths: "train/loss"."""

    def add(self, step: int, scalars: Mapping[str, float]) -> None: ...
    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None: ...
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


def open_boards(config: ExperimentConfig) -> list[Logger]:
    """The loggers that a training in `experiment_dir` has written to, as far as the config asks for them.

    They keep what they show of every step.

    Raises:
        ValueError: as `open_loggers`.
    """
    folder = Path(config.experiment_dir)
    loggers: list[Logger] = []
    if config.enable_tensorboard_log and (folder / TENSORBOARD).is_dir():
        loggers.append(TensorBoardLogger(folder))
    if config.enable_wandb_log and (folder / RUN_ID).is_file():
        check_loggers(config)
        loggers.append(WandbLogger(folder, config))
    return loggers


class TensorBoardLogger:
    """Event files in `folder/tensorboard`.

    Args:
        start_step: later steps of earlier runs are no longer shown; None leaves them.

    Raises:
        OSError: the files cannot be written; names their folder.
    """

    def __init__(self, folder: Path, *, start_step: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purged = None if start_step is None else start_step + 1
        self._folder = folder / TENSORBOARD
        # The thread writes as soon as there is a writer.
        self._previous_hook, threading.excepthook = threading.excepthook, self._leave_out_write_errors
        try:
            with naming(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=purged)
        except BaseException:
            threading.excepthook = self._previous_hook
            raise

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        with naming(self._folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)

    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Adds PNG and GIF files as they are. TensorBoard plays a GIF."""
        # The package has no types.
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]  # see above

        for name, path in pictures.items():
            with Image.open(path) as picture:
                width, height = picture.size
            # The writer's own `add_video` needs another package, and would encode the frames again.
            image = Summary.Image(
                height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes()
            )
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            with naming(self._folder):
                self._writer._get_file_writer().add_summary(summary, step)

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
                config=redact(as_plain(config)),
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

    def add_pictures(self, step: int, pictures: Mapping[str, Path]) -> None:
        """Adds PNG files as images, and GIF files as videos."""
        wandb = _import_wandb()
        shown = {
            name: wandb.Video(str(path), format="gif") if path.suffix == ".gif" else wandb.Image(str(path))
            for name, path in pictures.items()
        }
        self._run.log({"step": step, **shown})

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
