"""Runs the parts one after the other, each in a process with a limit, within the time of the run."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.lines import BEGIN, DONE, END, Line, write
from benchmarks.gpu.plan import Part

ROOT = Path(__file__).resolve().parents[2]
# A part that has less than this is left out: it would be cut off while it imports torch.
LEAST_SECONDS = 8.0
# From a polite signal to the end of a part's processes.
GRACE_SECONDS = 3.0
TAIL_LINES = 15


@dataclass(frozen=True)
class Ended:
    """How a part's process ended: DONE or what went wrong, and the last lines that it printed."""

    outcome: str
    tail: str


def run_parts(
    parts: Sequence[Part],
    command_of: Callable[[Part, float], Sequence[str]],
    folder: Path,
    deadline: float,
    *,
    needed: str = "",
    environment: Mapping[str, str] | None = None,
    after_each: Callable[[str, str], object],
) -> bool:
    """Runs every part, and goes on after one that fails; True if all of them are done.

    Args:
        parts: in order. Each may take its share of the time that is left to it and those behind it.
        command_of: the command of a part with so many seconds.
        folder: its results file gets a line when a part begins and when it ends, its logs/ what it prints.
        deadline: on the clock of `time.monotonic`.
        needed: the part without which the others are left out.
        environment: variables of the parts' processes, beside those of this one.
        after_each: called with a part's name and outcome.
    """
    found: dict[str, str] = {}
    for place, part in enumerate(parts):
        left = deadline - time.monotonic()
        limit = left * part.share / sum(each.share for each in parts[place:])
        limit = max(limit, min(part.least, left))
        began = time.monotonic()
        if found.get(needed, DONE) != DONE:
            ended = Ended(f"left out: there is no {needed}", "")
        elif limit < LEAST_SECONDS:
            ended = Ended(f"left out: {max(0.0, left):.0f} s were left for it and the parts behind it", "")
        else:
            write(folder, Line(part.name, BEGIN, values={"limit": round(limit, 1)}))
            log = folder / "logs" / f"{part.name}.txt"
            ended = run_part(command_of(part, limit), log, limit, environment or {})
        found[part.name] = ended.outcome
        values = {"outcome": ended.outcome, "seconds": round(time.monotonic() - began, 1)}
        write(folder, Line(part.name, END, ended.tail, values))
        after_each(part.name, ended.outcome)
    return all(outcome == DONE for outcome in found.values())


def run_part(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> Ended:
    """Runs a command from the repository's root for at most `limit` seconds; what it prints goes to `log`.

    None of its processes is left when this returns or raises.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            outcome = DONE if code == 0 else f"failed, exit status {code}"
        except subprocess.TimeoutExpired:
            outcome = f"cut off after {limit:.0f} s"
        finally:
            _end(process)
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-TAIL_LINES:]
    return Ended(outcome, "\n".join(tail))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the processes of the group that the process leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
