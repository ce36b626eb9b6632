"""What multiplies? Each acceleration alone, `auto` timesteps alone, both, and a stack of several.

Every arm is trained by the product's trainer from a config. Each finished training is a line of a results
file: its distances to the data over the steps, and the seconds of training. Trainings that are in the file
are skipped, so a run goes on where the last one stopped. Arms whose keys this revision lacks are left out
with a line. A seed decides initialisation, data order and noise for all arms.

    python -m benchmarks.compose --data-dir DIR --out FILE --hours 8           (all, the most wanted first)
    python -m benchmarks.compose --data-dir DIR --out FILE --pace              (seconds of a step of each arm)
    python -m benchmarks.compose --data-dir DIR --out FILE --data emoji_32 --processes flow \\
        --arms base auto muon+auto --seeds 0 1 2
    python -m benchmarks.compose --out FILE --report

benchmarks/flow/sets.py says how to make the files in DIR; benchmarks/compose/arms.py has the arms.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.compose.arms import EPSILON, FLOW, STACK, Arm, standard_arms
from benchmarks.compose.jobs import Jobs, Task
from benchmarks.compose.pace import paces
from benchmarks.compose.report import report
from benchmarks.compose.results import Training, pace_file, read_paces, read_trainings
from benchmarks.compose.sets import SETS
from benchmarks.compose.training import Cell, Settings, check
from benchmarks.results_file import append, check_exists, revision, say
from benchmarks.training_options import training_parser

STANDARD = "standard"


class Plan:
    """What is to be trained, in order: seed by seed, all flows before epsilon, data set by data set."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.settings = Settings(
            horizon=arguments.horizon, lr=arguments.lr, num_samples=arguments.num_samples
        )
        self.cells = [
            Cell(data, process, arguments.data_dir, self.settings)
            for process in arguments.processes
            for data in arguments.data
        ]
        self._arms = {process: self._named(process) for process in arguments.processes}

    def arms(self) -> dict[Cell, list[Arm]]:
        """The arms of each cell whose keys this revision has. A line for each reason names the others."""
        found: dict[Cell, list[Arm]] = {cell: [] for cell in self.cells}
        lacking: dict[str, dict[str, list[Cell]]] = {}
        for cell in self.cells:
            # A missing file is no reason to leave an arm out.
            cell.load()
            for arm in self._arms[cell.process]:
                try:
                    check(cell, arm)
                    found[cell].append(arm)
                except ValueError as error:
                    reason = str(error).splitlines()[0].partition("; known")[0][:160]
                    lacking.setdefault(reason, {}).setdefault(arm.name, []).append(cell)
        for reason, names in lacking.items():
            cells = {str(cell) for where in names.values() for cell in where}
            where = "" if len(cells) == len(self.cells) else f" on {'; '.join(sorted(cells))}"
            say(f"left out{where}: {' '.join(names)}: {reason}")
        return found

    def tasks(self) -> list[Task]:
        """Every training of the plan."""
        arms = self.arms()
        return [
            Task(cell, arm, seed, revision(), self._arguments.threads)
            for seed in self._arguments.seeds
            for cell in self.cells
            for arm in arms[cell]
        ]

    def _named(self, process: str) -> list[Arm]:
        found: list[Arm] = [Arm()]
        for name in self._arguments.arms:
            if name == STANDARD:
                found += standard_arms(process, self._arguments.stack)
            elif (arm := Arm.named(name)).fits(process):
                found.append(arm)
        return list(dict.fromkeys(found))


class Progress:
    """Counts trainings and says how long the rest takes, from the means of those that have ended."""

    def __init__(self, results: Sequence[Training], num_jobs: int) -> None:
        self._seconds: dict[int, list[float]] = {}
        self._num_jobs = num_jobs
        for training in results:
            self.ended(training)

    def ended(self, training: Training) -> None:
        """Adds a training to the means."""
        self._seconds.setdefault(training.options["horizon"], []).append(training.total_seconds)

    def hours(self, tasks: Sequence[Task]) -> str:
        """Hours that the tasks take with all processes; a training of the same length must have ended."""
        known = [self._seconds.get(task.cell.settings.horizon) for task in tasks]
        if not all(known):
            return "an unknown number of hours until the first has ended"
        found = sum(sum(seconds) / len(seconds) for seconds in known if seconds) / self._num_jobs / 3600
        return f"about {found:.1f} hours"


def main() -> int:
    """Prints a line per training, or the report. Returns 1 if a training failed."""
    arguments, parser = _arguments()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.report:
            check_exists(arguments.out)
            print(report(read_trainings(arguments.out), read_paces(pace_file(arguments.out))))
            return 0
        plan = Plan(arguments)
        if arguments.pace:
            return measure_paces(plan, arguments)
        return train_missing(plan, arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def measure_paces(plan: Plan, arguments: argparse.Namespace) -> int:
    """Appends the pace of each arm of each cell. Other processes on the machine should rest."""
    for cell, arms in plan.arms().items():
        for pace in paces(cell, arms, arguments.rounds, say=say, revision=revision()):
            append(pace_file(arguments.out), pace)
            say(f"{cell}: {pace.arm}: {pace.early:.3f} of the base's {pace.base_seconds:.3f} s a step")
    return 0


def train_missing(plan: Plan, arguments: argparse.Namespace) -> int:
    """Trains what the results file lacks, several at a time, until all is done or the hours are over."""
    results = read_trainings(arguments.out)
    done = {training.key for training in results}
    wanted = plan.tasks()
    tasks = [task for task in wanted if task.key not in done]
    progress = Progress(results, arguments.jobs)
    say(
        f"{len(wanted)} trainings, {len(wanted) - len(tasks)} done, {len(tasks)} to do:"
        f" {progress.hours(tasks)} with {arguments.jobs} at a time"
    )
    # Here, so that no two processes train the classifiers that judge.
    for cell in dict.fromkeys(task.cell for task in tasks):
        cell.prepare()
    jobs, has_failed = Jobs(tasks, arguments.hours), False
    for task, found in jobs.results(arguments.jobs):
        if isinstance(found, Training):
            append(arguments.out, found)
            progress.ended(found)
            last = {space: curve[-1] and round(curve[-1], 4) for space, curve in found.distances.items()}
            left = jobs.waiting
            say(f"{task}: {found.total_seconds:.0f} s, {last}; {len(left)} wait, {progress.hours(left)}")
        else:
            # Other seeds of the arm would fail for the same reason.
            jobs.drop(task.cell, task.arm)
            has_failed = has_failed or not found.startswith("ValueError")
            say(f"{task.cell}: {task.arm.name} is left out: {found[:300]}")
    return int(has_failed)


def _arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = training_parser(
        "compose", __doc__, horizon=Settings.horizon, lr=Settings.lr, num_samples=Settings.num_samples
    )
    add = parser.add_argument
    add("--pace", action="store_true", help="time a step of every arm in turn, and train nothing")
    add("--rounds", type=int, default=15, help="timed steps of each arm, with --pace")
    add("--data-dir", type=Path, default=Path("outputs/flow/data"), help="see benchmarks/flow/sets.py")
    add("--data", nargs="+", default=list(SETS), choices=list(SETS), help="data sets, in order")
    add("--processes", nargs="+", default=[FLOW, EPSILON], choices=[FLOW, EPSILON], help="in order")
    add("--arms", nargs="+", default=[STANDARD], help="such as muon+auto; standard: each alone and with auto")
    add("--stack", nargs="*", default=list(STACK), help="what the stack of the standard arms is made of")
    add("--jobs", type=int, default=2, help="trainings at a time, a process each")
    return parser.parse_args(), parser


if __name__ == "__main__":
    sys.exit(main())
