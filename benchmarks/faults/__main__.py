"""Breaks a training in every way its users have met, and reads what comes back.

Each fault runs real commands in a folder of its own, on a tiny DiT of digits or on images made for it. It
holds if a wrong input ends in one line on stderr that names the place, with an exit code other than 0. Where
a run can go on, the fault holds if it does and says so. A traceback, exit code 0 after an error, and a lost
file do not hold.

    python -m benchmarks.faults --out faults.md [--only weights,processes] [--package CHECKOUT]
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.faults import configs, data, processes, state, weights
from benchmarks.faults.bench import Bench, Fault, Outcome, train_base, wrong_with

GROUPS: dict[str, Sequence[Fault]] = {
    "keys": configs.KEYS,
    "commands": configs.COMMANDS,
    "weights": weights.FILES,
    "values": weights.VALUES,
    "folders": data.FOLDERS,
    "captions": data.CAPTIONS,
    "checkpoints": state.CHECKPOINTS,
    "leftovers": state.LEFTOVERS,
    "signals": processes.SIGNALS,
    "limits": processes.LIMITS,
    "processes": processes.PROCESSES,
}
WIDTH = 200


@dataclass(frozen=True)
class Tried:
    """A fault that was tried: what was printed, and what is wrong with that."""

    group: str
    name: str
    returncode: int
    said: str
    wrong: tuple[str, ...]


def main() -> None:
    """Prints a line per fault and writes the table; exit code 1 if one does not hold."""
    arguments = _arguments()
    package = arguments.package.resolve()
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        base = train_base(package, Path(name))
        tried = []
        for result in _tried(package, Path(name), base, arguments):
            tried.append(result)
            print(f"{'  '.join(result.wrong) or 'holds'}: {result.group}, {result.name}", flush=True)
            if arguments.json is not None:
                with arguments.json.open("a") as lines:
                    lines.write(json.dumps(vars(result)) + "\n")
    if arguments.out is not None:
        arguments.out.write_text(table(tried))
    held = sum(not result.wrong for result in tried)
    print(f"{held} of {len(tried)} hold")
    sys.exit(held < len(tried))


def _tried(package: Path, folder: Path, base: Path, arguments: argparse.Namespace) -> Iterator[Tried]:
    number = 0
    for group, faults in GROUPS.items():
        for fault in faults:
            if arguments.only and group not in arguments.only.split(","):
                continue
            if arguments.named and not re.search(arguments.named, fault.name):
                continue
            number += 1
            bench = Bench(package, folder / f"fault_{number:03d}", base)
            bench.folder.mkdir()
            started = time.monotonic()
            outcome = fault.act(bench)
            wrong = tuple(wrong_with(fault, outcome, bench))
            if arguments.verbose:
                print(outcome.text, f"[{outcome.returncode}, {time.monotonic() - started:.1f} s]")
            yield Tried(group, fault.name, outcome.returncode, _said(fault, outcome, bench), wrong)


def _said(fault: Fault, outcome: Outcome, bench: Bench) -> str:
    """The line that a user reads, with short paths."""
    lines = outcome.lines if fault.ends == "error" else [*outcome.lines, *outcome.stdout.splitlines()]
    fitting = [line for line in lines if any(re.search(word, line, re.IGNORECASE) for word in fault.says)]
    line = next(iter([*fitting, *lines]), "")
    for path, short in ((bench.run_folder, "RUN"), (bench.folder, "."), (bench.package, "CHECKOUT")):
        line = line.replace(str(path), short)
    line = " ".join(line.split())
    return line if len(line) <= WIDTH else f"{line[:WIDTH]} ..."


def table(tried: Sequence[Tried]) -> str:
    """The faults as a Markdown table for each group."""
    lines = []
    for group in dict.fromkeys(result.group for result in tried):
        own = [result for result in tried if result.group == group]
        held = sum(not result.wrong for result in own)
        lines += ["", f"### {group.capitalize()}: {held} of {len(own)} hold", ""]
        lines += ["| fault | exit | what is printed | |", "|---|---|---|---|"]
        for result in own:
            said = result.said.replace("|", "&#124;").replace("<", "&lt;")
            verdict = "; ".join(result.wrong).replace("|", "&#124;") or "holds"
            lines.append(f"| {result.name} | {result.returncode} | `{said}` | {verdict} |")
    return "\n".join(lines).lstrip() + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="write the table here, as Markdown")
    parser.add_argument("--json", type=Path, help="append every result here, as JSON lines")
    parser.add_argument("--only", default="", help=f"groups with commas between: {', '.join(GROUPS)}")
    parser.add_argument("--named", default="", help="a regular expression that names must have")
    parser.add_argument("--verbose", action="store_true", help="print everything that the commands print")
    default = Path(os.path.abspath(__file__)).parents[2]
    parser.add_argument("--package", type=Path, default=default, help="the checkout to try; default this one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
