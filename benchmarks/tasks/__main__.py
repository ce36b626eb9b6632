"""Which policy is fastest on each stage of a cascade, and on shapes? And where should it be centred?

Every training is made by the product's trainer from a config, on data that the package has. Each one that
has ended is a line of a results file, and those that are there are skipped: a run goes on where the last one
stopped. A seed decides initialisation, data order and noise for all policies.

    python -m benchmarks.tasks --out FILE --hours 8                       (all cells, the most wanted first)
    python -m benchmarks.tasks --out FILE --cells emoji_16_to_32/flow --policies auto auto@rest auto@3
    python -m benchmarks.tasks --out FILE --report

benchmarks/tasks/cells.py has the cells, benchmarks/tasks/arms.py the policies.
"""

import argparse
import sys
import time
from dataclasses import replace

import torch

from benchmarks.compose.results import Training, read_trainings
from benchmarks.results_file import append, check_exists, revision, say
from benchmarks.tasks.arms import BASE, Policy
from benchmarks.tasks.cells import CELLS, SETTINGS, Cell
from benchmarks.tasks.report import report
from benchmarks.tasks.training import train
from benchmarks.training_options import training_parser

# A training: what, how, and from which seed.
Job = tuple[Cell, Policy, int]


def main() -> int:
    """Prints a line per training, or the report. Returns 1 if a training failed."""
    arguments, parser = _arguments()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.report:
            check_exists(arguments.out)
            print(report(read_trainings(arguments.out)))
            return 0
        return train_missing(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """Every training, in order: seed by seed, cell by cell, uniform draws first."""
    settings = replace(
        SETTINGS, horizon=arguments.horizon, lr=arguments.lr, num_samples=arguments.num_samples
    )
    cells = [Cell.named(name, arguments.out.parent, settings) for name in arguments.cells]
    given = [Policy.named(name) for name in (BASE, *arguments.policies)]
    return [
        (cell, policy, seed)
        for seed in arguments.seeds
        for cell in cells
        for policy in dict.fromkeys(given if arguments.policies else cell.policies())
    ]


def train_missing(arguments: argparse.Namespace) -> int:
    """Trains what the results file lacks, one at a time, until all is done or the hours are over."""
    done = {training.key for training in read_trainings(arguments.out)}
    wanted = jobs(arguments)
    missing = [job for job in wanted if job[0].training(*job[1:]).key not in done]
    say(f"{len(wanted)} trainings, {len(wanted) - len(missing)} done, {len(missing)} to do")
    end, has_failed = time.monotonic() + 3600 * arguments.hours, False
    for cell, policy, seed in missing:
        if time.monotonic() >= end:
            break
        found = _trained(cell, policy, seed)
        if isinstance(found, str):
            has_failed = True
            say(f"{cell}: {policy.name}, seed {seed}, is left out: {found}")
            continue
        append(arguments.out, found)
        last = {name: float(f"{values[-1] or float('nan'):.4g}") for name, values in found.distances.items()}
        say(f"{cell}: {policy.name}, seed {seed}: {found.total_seconds:.0f} s, {last}")
    return int(has_failed)


def _trained(cell: Cell, policy: Policy, seed: int) -> Training | str:
    """The training, or the type and first line of what went wrong."""
    try:
        return train(cell, policy, seed, revision=revision())
    # One policy's fault must not end a night of trainings.
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = training_parser(
        "tasks", __doc__, horizon=SETTINGS.horizon, lr=SETTINGS.lr, num_samples=SETTINGS.num_samples
    )
    add = parser.add_argument
    add("--cells", nargs="+", default=list(CELLS), choices=CELLS, help="in order")
    add("--policies", nargs="+", default=[], help="beside uniform, such as auto@1.5; none: the cell's own")
    return parser.parse_args(), parser


if __name__ == "__main__":
    sys.exit(main())
