"""Everything that needs a GPU, as one command for one card: tests, training steps against peers, a race.

    python -m benchmarks.gpu [--out outputs/gpu] [--hosts DIR] [--minutes 8] [--only tests dit-b2]
    python -m benchmarks.gpu --device cpu --small
    python -m benchmarks.gpu --report outputs/gpu/2026-11-30_200000

Each part runs in a process of its own with a share of the time, the most important first; a part that fails
or takes too long does not stop the others. Every run gets a folder of its own in --out: results.jsonl, which
gets a line for each thing found, logs/ with what the parts printed, and report.md, written after each part.
The exit status is 0 if all parts are done. Neither git nor a network is needed.

--hosts holds checkouts named owner+name, see benchmarks/gpu/plan.py; the report names those that are not
there. --device cpu --small tries the whole command with tiny shapes.
"""

import argparse
import importlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.job import Job
from benchmarks.gpu.lines import FOUND, RUN, Line, read, write
from benchmarks.gpu.plan import PARTS, Part
from benchmarks.gpu.report import report
from benchmarks.gpu.running import GRACE_SECONDS, run_parts
from benchmarks.results_file import revision

NAMES = [part.name for part in PARTS]
# Share of the run's time, for the end of the last part and the report.
RESERVE_SECONDS = GRACE_SECONDS + 2


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per part and the path of the report. Returns 0 if all parts are done, else 1."""
    began = time.monotonic()
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(given)
    if arguments.part is not None:
        _measure(arguments)
        return 0
    if arguments.report is not None:
        print(_write_report(arguments.report).read_text(encoding="utf-8"))
        return 0
    # Ends the part that runs. It has a process group of its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    folder = _new_folder(arguments.out)
    parts = [part for part in PARTS if part.name in {"device", *(arguments.only or NAMES)}]
    deadline = began + 60 * arguments.minutes - RESERVE_SECONDS
    write(folder, Line("", RUN, values=_run_values(arguments, parts, given)))
    _print_plan(parts, deadline - time.monotonic(), folder)

    def after_each(name: str, outcome: str) -> None:
        _write_report(folder)
        print(f"{time.monotonic() - began:6.0f} s  {name}: {outcome}", flush=True)

    def command_of(part: Part, limit: float) -> list[str]:
        return [sys.executable, "-m", "benchmarks.gpu", *_child_options(arguments, part, folder, limit)]

    try:
        is_done = run_parts(
            parts,
            command_of,
            folder,
            deadline,
            needed="device",
            # Two threads wait for each other more than they gain from tiny tensors.
            environment={"OMP_NUM_THREADS": "1"} if arguments.small else {},
            after_each=after_each,
        )
    finally:
        # With what a part has found that is cut off by a signal.
        _write_report(folder)
    print(folder / "report.md")
    return 0 if is_done else 1


def _measure(arguments: argparse.Namespace) -> None:
    """Runs one part in this process. What it finds is added to the results of the folder --out."""
    # Here, because it imports torch, which the process that starts the parts does not need.
    [module, function] = next(part.run for part in PARTS if part.name == arguments.part).split(":")
    measure = getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)
    job = Job(
        part=arguments.part,
        device=arguments.device,
        hosts=arguments.hosts or arguments.out / "no-checkouts",
        data=arguments.data_dir,
        folder=arguments.out,
        seconds=arguments.seconds,
        is_small=arguments.small,
        say=lambda text, values: write(arguments.out, Line(arguments.part, FOUND, text, dict(values))),
    )
    measure(job)


def _child_options(arguments: argparse.Namespace, part: Part, folder: Path, limit: float) -> list[str]:
    options = ["--part", part.name, "--seconds", f"{limit:.1f}", "--out", str(folder)]
    options += ["--device", arguments.device, "--data-dir", str(arguments.data_dir)]
    if arguments.hosts is not None:
        options += ["--hosts", str(arguments.hosts)]
    return options + ["--small"] * arguments.small


def _run_values(
    arguments: argparse.Namespace, parts: Sequence[Part], given: Sequence[str]
) -> dict[str, object]:
    wanted = sorted({name for part in parts for name in part.checkouts})
    missing = [name for name in wanted if arguments.hosts is None or not (arguments.hosts / name).is_dir()]
    return {
        "began": time.strftime("%Y-%m-%d %H:%M:%S"),
        "revision": arguments.revision or revision(),
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *given]),
        "minutes": arguments.minutes,
        "parts": [part.name for part in parts],
        "is_small": arguments.small,
        "missing": missing,
    }


def _print_plan(parts: Sequence[Part], seconds: float, folder: Path) -> None:
    whole = sum(part.share for part in parts)
    shares = ", ".join(f"{part.name} {seconds * part.share / whole:.0f}" for part in parts)
    print(f"{seconds:.0f} s for {len(parts)} parts: {shares}; results go to {folder}", flush=True)


def _write_report(folder: Path) -> Path:
    path = folder / "report.md"
    path.write_text(report(read(folder)), encoding="utf-8")
    return path


def _new_folder(out: Path) -> Path:
    """A folder of this run, named by the time."""
    name, number = time.strftime("%Y-%m-%d_%H%M%S"), 0
    while True:
        folder = out / (f"{name}-{number}" if number else name)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder.resolve()


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    hosts = os.environ.get("SPEEDIT_HOSTS")
    add("--out", type=Path, default=Path("outputs/gpu"), help="each run gets a folder in it")
    add("--hosts", type=Path, default=hosts and Path(hosts), help="checkouts; $SPEEDIT_HOSTS if left out")
    add("--data-dir", type=Path, default=Path("outputs/flow/data"), help="of the race; may be absent")
    add("--minutes", type=float, default=8.0, help="for all parts together")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu needs --small")
    add("--only", nargs="+", choices=NAMES, help="parts to run; the device comes first in any case")
    add("--small", action="store_true", help="tiny shapes, to try the command")
    add("--revision", default="", help="of the code, where git cannot say it")
    add("--report", type=Path, help="folder of a run: write its report again, and print it")
    add("--part", choices=NAMES, help=argparse.SUPPRESS)
    add("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.minutes <= 0:
        parser.error(f"--minutes needs to be > 0, got {arguments.minutes:g}")
    if arguments.device == "cpu" and not (arguments.small or arguments.report):
        parser.error("--device cpu needs --small: the shapes of a card would take hours")
    for name in ("hosts", "report"):
        folder = getattr(arguments, name)
        if folder is not None and not folder.is_dir():
            parser.error(f"--{name} needs an existing folder, got {folder}")
    for name in ("out", "hosts", "data_dir", "report"):
        folder = getattr(arguments, name)
        # The parts run in the repository's root.
        setattr(arguments, name, folder and folder.resolve())
    return arguments


if __name__ == "__main__":
    sys.exit(main())
