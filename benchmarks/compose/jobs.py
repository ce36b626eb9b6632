"""Trainings of benchmarks/compose, several at a time, each in a process of its own."""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass

import torch

from benchmarks.compose.arms import Arm
from benchmarks.compose.results import Training
from benchmarks.compose.training import Cell, train


@dataclass(frozen=True)
class Task:
    """One training that a process makes."""

    cell: Cell
    arm: Arm
    seed: int
    revision: str
    num_threads: int

    def __str__(self) -> str:
        return f"{self.cell}: {self.arm.name}, seed {self.seed}"

    @property
    def key(self) -> str:
        """See `Training.key`."""
        return self.cell.training(self.arm, self.seed).key


class Jobs:
    """Hands out tasks in order, until all are done or the time is over.

    Args:
        tasks: in order.
        hours: no training begins later.
    """

    def __init__(self, tasks: Sequence[Task], hours: float) -> None:
        self._waiting, self._end = list(tasks), time.monotonic() + 3600 * hours

    @property
    def waiting(self) -> list[Task]:
        """What has not begun."""
        return list(self._waiting)

    def drop(self, cell: Cell, arm: Arm) -> None:
        """Leaves out what is left of an arm."""
        self._waiting = [task for task in self._waiting if (task.cell, task.arm) != (cell, arm)]

    def results(self, num_jobs: int) -> Iterator[tuple[Task, Training | str]]:
        """Each task with its training, or with the reason why there is none, as they end.

        Args:
            num_jobs: trainings at a time; one is made in this process.
        """
        return self._one_by_one() if num_jobs == 1 else self._side_by_side(num_jobs)

    def _one_by_one(self) -> Iterator[tuple[Task, Training | str]]:
        while (task := self._next()) is not None:
            yield task, run(task)

    def _side_by_side(self, num_jobs: int) -> Iterator[tuple[Task, Training | str]]:
        running: dict[Future[Training | str], Task] = {}
        # A new interpreter each: a fork of a process with threads of its own may hang.
        with ProcessPoolExecutor(num_jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            while True:
                while len(running) < num_jobs and (task := self._next()) is not None:
                    running[pool.submit(run, task)] = task
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()

    def _next(self) -> Task | None:
        return self._waiting.pop(0) if self._waiting and time.monotonic() < self._end else None


def run(task: Task) -> Training | str:
    """The training of a task, or the type and first line of what went wrong."""
    torch.set_num_threads(task.num_threads)
    try:
        return train(task.cell, task.arm, task.seed, revision=task.revision)
    # One arm's fault must not end a night of trainings.
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
