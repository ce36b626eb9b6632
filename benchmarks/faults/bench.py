"""What a fault is, how it is tried on a real command, and when what comes back is clear."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

CONFIG = "configs/image/digits/speedit.yaml"
# A training of seconds.
TINY = (
    "model.hidden_size=32",
    "model.depth=1",
    "data.batch_size=8",
    "ckpt_every=2",
    "log_every=1",
    "sampler.num_steps=3",
    "num_samples=4",
    "enable_tensorboard_log=false",
)
NUM_STEPS = 4
HANG_SECONDS = 1200  # a command takes about five seconds
# A progress bar, and the log of torchrun's processes.
_NOISE = re.compile(r"^\s*$|^\S.*: +\d+%\||^[WE]\d{4} |^\[rank\d+\]:\[W")
# What torchrun prints about a job that failed, after the lines of the job's own processes.
_REPORT = re.compile(
    r'^Traceback \(most recent call last\):\n  File "\S*torchrun".*', re.DOTALL | re.MULTILINE
)

Ending = Literal["error", "well"]


@dataclass(frozen=True)
class Outcome:
    """What a user sees of one command."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> list[str]:
        """The lines on stderr, without progress bars and without torchrun's own report."""
        found = [line.rsplit("\r", 1)[-1] for line in _REPORT.sub("", self.stderr).split("\n")]
        return [line for line in found if not _NOISE.match(line)]

    @property
    def text(self) -> str:
        """Everything that was printed, without torchrun's own report."""
        return f"{self.stdout}\n{_REPORT.sub('', self.stderr)}"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong, and what a user may expect of it.

    Args:
        name: the fault, as a user would tell it.
        act: makes the fault and runs the command.
        says: regular expressions; each is found in what is printed, in any case.
        ends: `error` wants an exit code other than 0 and one line on stderr; `well` wants 0.
        leaves: checks the files afterwards, and returns what is wrong with them.
        lines: lines that an error may take.
        never: a text that must not be printed.
    """

    name: str
    act: Callable[["Bench"], Outcome]
    says: Sequence[str] = ()
    ends: Ending = "error"
    leaves: Callable[["Bench"], str | None] | None = None
    lines: int = 1
    never: str | None = None


@dataclass
class Bench:
    """Where one fault is tried: a folder of its own, and the code of one checkout.

    Args:
        package: the checkout whose commands run.
        folder: an empty folder.
        base: a finished run of NUM_STEPS steps, which nothing changes.
    """

    package: Path
    folder: Path
    base: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def run_folder(self) -> Path:
        """The `experiment_dir` of the commands."""
        return self.folder / "run"

    def trained(self) -> Path:
        """A copy of the finished run, in `run_folder`."""
        shutil.copytree(self.base, self.run_folder)
        return self.run_folder

    def checkpoint(self, step: int = NUM_STEPS) -> Path:
        """Folder of a checkpoint of the run."""
        return self.run_folder / "checkpoints" / f"step_{step:07d}"

    def arguments(self, *more: str, phase: str = "train", config: str | Path | None = None) -> list[str]:
        """The command of one phase; later arguments override earlier ones."""
        # As a path: a name would be looked up in the package that is installed.
        config = self.package / CONFIG if config is None else config
        main = str(self.package / "tools/main.py")
        steps = (f"max_training_steps={NUM_STEPS}",) if phase == "train" else ()
        tiny = (f"experiment_dir={self.run_folder}", *TINY, *steps)
        return [sys.executable, main, "-c", str(config), "-p", phase, *tiny, *more]

    def speedit(self, *more: str, phase: str = "train", config: str | Path | None = None) -> Outcome:
        """Runs one phase."""
        return self.command(self.arguments(*more, phase=phase, config=config))

    def tool(self, name: str, *arguments: str) -> Outcome:
        """Runs a command line of tools/."""
        return self.command([sys.executable, str(self.package / "tools" / f"{name}.py"), *arguments])

    def shell(self, line: str, arguments: Sequence[str]) -> Outcome:
        """Runs `arguments` as "$@" in a line of bash, for limits and pipes."""
        return self.command(["bash", "-c", line, "bash", *arguments])

    def start(self, arguments: Sequence[str], *, stdout: int | None = None) -> "subprocess.Popen[str]":
        """Starts a command in the folder of the fault, in a process group of its own."""
        return subprocess.Popen(
            list(arguments),
            cwd=self.folder,
            env=self._environment(),
            stdout=subprocess.PIPE if stdout is None else stdout,
            stderr=subprocess.PIPE if stdout is None else stdout,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=_heed_signals,
        )

    def command(self, arguments: Sequence[str]) -> Outcome:
        """Runs a command to its end."""
        return finished(self.start(arguments))

    def _environment(self) -> Mapping[str, str]:
        own = {"PYTHONPATH": str(self.package), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return {**os.environ, **own, **self.environment}


def _heed_signals() -> None:
    # A job in the background, or under nohup, ignores them, and so would its commands.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finished(process: "subprocess.Popen[str]") -> Outcome:
    """What the process printed, after its end."""
    stdout, stderr = process.communicate(timeout=HANG_SECONDS)
    return Outcome(process.returncode, stdout or "", stderr or "")


def train_base(package: Path, folder: Path) -> Path:
    """Trains the run that faults copy, and returns its folder.

    Raises:
        SystemExit: the training failed.
    """
    bench = Bench(package, folder, folder)
    outcome = bench.speedit()
    if outcome.returncode:
        raise SystemExit(f"the run without a fault failed:\n{outcome.text}")
    return bench.run_folder


def wrong_with(fault: Fault, outcome: Outcome, bench: Bench) -> list[str]:
    """What a user would complain about; nothing if all is well."""
    found = []
    if "Traceback (most recent call last)" in outcome.text:
        found.append("a traceback")
    if fault.ends == "error" and outcome.returncode == 0:
        found.append("exit code 0")
    if fault.ends == "well" and outcome.returncode != 0:
        found.append(f"exit code {outcome.returncode}")
    if fault.ends == "error" and len(outcome.lines) > fault.lines:
        found.append(f"{len(outcome.lines)} lines on stderr")
    missing = [words for words in fault.says if not re.search(words, outcome.text, re.IGNORECASE)]
    found += [f"no word of {words!r}" for words in missing]
    if fault.never is not None and fault.never in outcome.text:
        found.append(f"it says {fault.never!r}")
    if fault.leaves is not None and (left := fault.leaves(bench)):
        found.append(left)
    return found
