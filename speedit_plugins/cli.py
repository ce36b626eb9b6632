"""The command line `speedit -c CONFIG -p PHASE [key=value ...]`. `tools/main.py` runs the same code."""

import argparse
import hashlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from threading import enumerate as running_threads
from types import FrameType
from typing import NoReturn

from speedit_plugins.registry import is_raised_here, raising_module
from speedit_plugins.trainer.config.key_names import option_hint, value_hint
from speedit_plugins.trainer.config.schema import PHASES, ExperimentConfig
from speedit_plugins.trainer.config.validation import key_paths
from speedit_plugins.trainer.exhaustion import memory_line, out_of_files
from speedit_plugins.trainer.parallel.peers import LostPeerError, is_lost_peer
from speedit_plugins.trainer.streams import lasting_streams
from speedit_plugins.trainer.training.interrupt import WRITER, Interrupted

USER_ERROR = 2
PEER_LOST = 3
# torchrun reports the earliest failure as the cause, and counts in whole seconds. A process that lost another
# waits this long, so that the failure of the other process is the earlier one.
LAUNCHER_SECONDS = 2.0

# The module of each phase. The function in it has the phase's name.
_HOMES = {
    "train": "speedit_plugins.trainer.training.train",
    "sample": "speedit_plugins.trainer.sampling.grids",
    "inference": "speedit_plugins.trainer.sampling.inference",
    "test": "speedit_plugins.trainer.sampling.evaluate",
}


class UserError(Exception):
    """What a launcher is told of an error that the user can mend: the line that was said."""


def command() -> NoReturn:
    """The program `speedit`: runs `main`, and ends the process with its code."""
    code = main()
    if code and WRITER in {thread.name for thread in running_threads()}:
        # The writer, in the middle of a file, would turn the end of the interpreter into an abort.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with lasting_streams():
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one phase of an experiment.

    Args:
        argv: arguments after the program's name. None takes those of the process.

    Returns:
        The phase's exit code. 2 after a user's error, 3 if another process was lost, 128 + its number after a
        signal that ended the phase (130 for Ctrl-C). In these cases stderr has one line.
    """
    if os.environ.get("RANK", "0") != "0":
        # Under torchrun every process reads the config. Only rank 0 reports about it.
        logging.getLogger("speedit_plugins").setLevel(logging.ERROR)
    # At its import it tells of a kernel for 4-bit layers that is not there; diffusers imports it unasked.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    task = _Task()
    with lasting_streams(), _signals_interrupt():
        try:
            return _started(task, argv)
        except KeyboardInterrupt as error:
            return _interrupted(error, task)
        except Exception as error:
            return _failed(error, task)


@dataclass
class _Task:
    """What the command is about, as far as it is known."""

    phase: str | None = None
    config: ExperimentConfig | None = None


def _started(task: _Task, argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_intermixed_args(argv)
    for name in ("processes", "gpu_memory"):
        if getattr(arguments, name) is not None and not (arguments.dry_run and arguments.phase == "train"):
            raise ValueError(f"--{name.replace('_', '-')} has no effect without -p train --dry-run")
    # Imported here: without the trainer extra OmegaConf is missing, and the error is one line.
    config = import_module("speedit_plugins.trainer.config.loading").load_config(
        arguments.config,
        arguments.phase,
        arguments.overrides,
        allow_python=arguments.allow_python_config,
        imports=arguments.imports,
    )
    if arguments.dry_run:
        return _describe(config, arguments)
    if _is_launched() and arguments.phase != "train":
        raise ValueError(f"{arguments.phase} runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    task.phase, task.config = arguments.phase, config
    return _run(arguments.phase, config)


def _run(phase: str, config: ExperimentConfig) -> int:
    if os.environ.get("RANK", "0") == "0":
        # Imports take seconds, so this line shows that the command has started.
        sys.stdout.write(f"{phase}: starting in {config.experiment_dir}\n")
        sys.stdout.flush()
    # This imports torch, so it comes after the config was checked.
    runner = import_module(_HOMES[phase])
    return int(getattr(runner, phase)(config))


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP raise, as Ctrl-C does. A training asks for them itself.

    Not in a launched process: its launcher ends it by SIGTERM, and says why.
    """

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted(number=number)

    before = {}
    if not _is_launched() and current_thread() is main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            # Another handler is the caller's, and nohup ignores SIGHUP.
            if signal.getsignal(number) is signal.SIG_DFL:
                before[number] = signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(error: KeyboardInterrupt, task: _Task) -> int:
    """Says what a signal left. Returns the exit code."""
    stages = {None: "nothing was started", "train": "no step was trained"}
    left = str(error) or f"interrupted; {stages.get(task.phase, 'nothing was written')}"
    sys.stderr.write(f"speedit: {_rank()}{left}\n")
    return 128 + (error.number if isinstance(error, Interrupted) else signal.SIGINT)


def _failed(error: Exception, task: _Task) -> int:
    """Says why the command failed, in one line. Returns the exit code; raises a fault of this program."""
    if _is_launched() and is_lost_peer(error):
        lost = "lost another process; if it failed, its own message says why: "
        sys.stderr.write(
            f"speedit: {_rank()}{'' if isinstance(error, LostPeerError) else lost}{_one_line(error)}\n"
        )
        sys.stderr.flush()
        time.sleep(LAUNCHER_SECONDS)
        _tell_launcher(error)
        return PEER_LOST
    line = out_of_files(error)
    if line is None and task.phase is not None and task.config is not None:
        line = memory_line(error, task.phase, task.config)
    if line is None:
        if not _is_user_error(error):
            _tell_launcher(error)
            raise error
        line = _one_line(error)
    if _is_first_to_say(line):
        sys.stderr.write(f"speedit: {_rank()}error: {line}\n")
        sys.stderr.flush()
    elif task.phase is not None:
        # All processes met the error in the run. The one that said it is the cause for the launcher.
        time.sleep(LAUNCHER_SECONDS)
    try:
        # torchrun prints the frames of what is handled here. Where a line tells the error, they only hide it.
        raise UserError(line) from None
    except UserError as said:
        _tell_launcher(said)
    return USER_ERROR


def _is_first_to_say(line: str) -> bool:
    """Whether no other process of this machine and launch has said the line.

    torchrun gives each process a file for its error, in a folder per process. The folder above is that of the
    launch.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not _is_launched() or not file:
        return True
    said = Path(file).parent.parent / f"said_{hashlib.sha256(line.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        # Twice is better than not at all.
        return True
    return True


def _describe(config: ExperimentConfig, arguments: argparse.Namespace) -> int:
    # Flush, so that the config is on the screen while torch loads.
    sys.stdout.write(import_module("speedit_plugins.trainer.config.loading").to_yaml(config))
    sys.stdout.flush()
    describe = import_module("speedit_plugins.trainer.training.dry_run").describe
    description = describe(config, processes=arguments.processes, gpu_memory=arguments.gpu_memory)
    sys.stdout.write(f"\n{description.text}\n")
    sys.stdout.flush()
    # No other phase needs the data of the training.
    if description.fault is not None and arguments.phase == "train":
        raise ValueError(f"the data cannot be used: {description.fault}")
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser that raises a ValueError where argparse prints the usage and exits."""

    def error(self, message: str) -> NoReturn:
        keys = list(key_paths())
        raise ValueError(f"{message}{option_hint(message, keys)}; see speedit --help")


def _phase(name: str) -> str:
    if name not in PHASES:
        hint = value_hint(name, PHASES)
        raise argparse.ArgumentTypeError(f"invalid choice: {name!r}{hint} (choose from {', '.join(PHASES)})")
    return name


def _processes(text: str) -> int:
    if not re.fullmatch("[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"wanted a number of processes such as 8, got {text!r}")
    return int(text)


def _memory_size(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?(gb|gib)", text.lower())
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"wanted a size such as 80GB or 80GiB, got {text!r}")
    return int(float(found[1]) * {"gb": 10**9, "gib": 2**30}[found[2]])


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="speedit",
        description="Train a diffusion transformer, draw samples, compare them.",
        epilog="example: speedit -c image/digits/speedit.yaml -p train optimizer.lr=1e-3",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-c", "--config", required=True, help="a file, or a name below ./configs or the packaged configs"
    )
    parser.add_argument("-p", "--phase", required=True, type=_phase, metavar=f"{{{','.join(PHASES)}}}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    parser.add_argument("--dry-run", action="store_true", help="print the config, sizes and memory, and exit")
    parser.add_argument(
        "--processes", type=_processes, metavar="N", help="plan a training of N processes; with --dry-run"
    )
    parser.add_argument(
        "--gpu-memory",
        type=_memory_size,
        metavar="SIZE",
        help="say which plugin fits a GPU of so much, such as 80GB; with --dry-run",
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers datasets, models, policies, ...; may be given several times",
    )
    parser.add_argument(
        "--allow-python-config", action="store_true", help="read an mmengine .py config, which executes it"
    )
    return parser


def _is_launched() -> bool:
    """Whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def _rank() -> str:
    """The prefix "rank N: " if there are several processes, "" otherwise."""
    return f"rank {os.environ['RANK']}: " if _is_launched() else ""


def _tell_launcher(error: Exception) -> None:
    """Records the error where torchrun looks for the cause of a failed job."""
    if _is_launched():
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _is_user_error(error: Exception) -> bool:
    """Whether the user can fix the error: a file, a missing package, or a ValueError raised by this package.

    A ValueError raised inside a library is a fault of this program.
    """
    if isinstance(error, OSError):
        return True
    if isinstance(error, ModuleNotFoundError):
        return not str(error.name).startswith("speedit_plugins")
    return isinstance(error, ValueError) and is_raised_here(error)


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        asking = raising_module(error)
        if is_raised_here(error) and not str(asking).startswith("speedit_plugins"):
            return f"{asking} needs {error.name}, which is not installed"
        return f"the trainer needs {error.name}: pip install 'speedit-plugins[trainer]'"
    return " ".join(str(error).split()) or type(error).__name__
