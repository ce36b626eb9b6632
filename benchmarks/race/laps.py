"""The loop of benchmarks/race: contestants take turns, and each evaluation is a line of a results file.

Seconds are of training alone: evaluations, checkpoints, and the first step of each process and after each
evaluation (it compiles and allocates) do not count. Such a step counts as the mean of the steps after it.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.race.quality import Measure, reach
from benchmarks.race.training import Training
from benchmarks.results_file import append, read_lines

# Shares of the steps after which samples are drawn. A peer is judged at its end, so it needs fewer.
EVALUATED = (0.05, 0.08, 0.125, 0.2, 0.3, 0.45, 0.65, 1.0)
PEERS_EVALUATED = (0.125, 0.3, 0.65, 1.0)
# Turns of a contestant in a race. Others train between them, so a slow moment of the machine hits everybody.
NUM_TURNS = 40
# Steps that tell how fast a contestant is.
PACED = 4


@dataclass(frozen=True)
class Lap:
    """One evaluation of a contestant.

    Args:
        contestant: its name, with the learning rate's factor where several are tried.
        entry: the name without that.
        seed: of the training.
        step: after which the samples are drawn.
        seconds: of training up to there, by the wall clock.
        cpu_seconds: the same, of all the process's threads.
        setup_seconds: of building it and of its first step, summed over the processes that trained it.
        distances: space -> squared Fréchet distance; None is infinite.
        num_parameters: that sampling uses.
        num_training_only: further ones.
        runs: when the processes that trained it began, and the revision of their code; contestants of one
            run took turns.
        settings: what all contestants of the race share.
    """

    contestant: str
    entry: str
    seed: int
    step: int
    seconds: float
    cpu_seconds: float
    setup_seconds: float
    distances: Mapping[str, float | None]
    num_parameters: int
    num_training_only: int
    runs: Sequence[str]
    settings: Mapping[str, Any]

    @property
    def distance(self) -> float:
        """The distance that decides the race."""
        return self.in_space("")

    def in_space(self, space: str) -> float:
        """The distance in a space, '' being the first; infinite if a sample is not finite."""
        found = {name: float("inf") if value is None else value for name, value in self.distances.items()}
        return found[space] if space else reach(found)


@dataclass(frozen=True)
class Entry:
    """A training that takes part. `build` makes it before its first step; see `Lap` for the rest.

    It is evaluated after the shares `evaluated` of its steps, in rising order, the last of which is 1.
    """

    contestant: str
    entry: str
    seed: int
    build: Callable[[], Training]
    evaluated: Sequence[float] = EVALUATED

    @property
    def folder(self) -> str:
        """A name for a folder of its own."""
        plain = "".join(letter if letter.isalnum() else "-" for letter in self.contestant)
        return f"{plain}-{self.seed}"

    def evaluations(self, steps: int) -> list[int]:
        """Steps of its evaluations, rising, in a training of so many."""
        return steps_of(self.evaluated, steps)


@dataclass(frozen=True)
class Plan:
    """Steps of a race, what its lines share, and the name of this run, as in `Lap.runs`."""

    steps: int
    settings: Mapping[str, Any]
    run: str
    num_turns: int = NUM_TURNS
    device: str = "cpu"

    @cached_property
    def marks(self) -> list[int]:
        """Steps at which another contestant has its turn, rising; all evaluations are among them."""
        turns = [number / self.num_turns for number in range(1, self.num_turns)]
        return steps_of([*turns, *EVALUATED, *PEERS_EVALUATED], self.steps)


class Runner:
    """One entry in this process. It goes on from its last line in the results file."""

    def __init__(self, entry: Entry, plan: Plan, out: Path) -> None:
        self.entry, self._plan, self._out = entry, plan, out
        self._states = out / "state" / entry.folder
        earlier = [lap for lap in read_laps(out) if (lap.contestant, lap.seed) == self._key]
        self._last = max(earlier, key=lambda lap: lap.step, default=None)
        self.step = 0 if self._last is None else self._last.step
        self.seconds = 0.0 if self._last is None else self._last.seconds
        self.cpu_seconds = 0.0 if self._last is None else self._last.cpu_seconds
        self._setup = 0.0 if self._last is None else self._last.setup_seconds
        self._training: Training | None = None
        self._num_untimed = 0
        self._is_cold = False

    @property
    def _key(self) -> tuple[str, int]:
        return self.entry.contestant, self.entry.seed

    @property
    def is_done(self) -> bool:
        """Whether it has trained to the end."""
        return self.step >= self._plan.steps

    def train_to(self, mark: int) -> None:
        """Trains up to a step; nothing if it is there already."""
        if self.step >= mark:
            return
        if self._training is None:
            start = time.perf_counter()
            self._training = self._built()
            with self._training.turn():
                self._training.step()
            self._synchronize()
            self._setup += time.perf_counter() - start
            self.step += 1
            self._num_untimed += 1
        elif self._is_cold and mark - self.step > 1:
            with self._training.turn():
                self._training.step()
            self.step += 1
            self._num_untimed += 1
        self._is_cold = False
        num_steps = mark - self.step
        with self._training.turn():
            start, cpu = time.perf_counter(), time.process_time()
            for _ in range(num_steps):
                self._training.step()
            self._synchronize()
            taken, of_cpu = time.perf_counter() - start, time.process_time() - cpu
        if num_steps:
            # Steps that were not timed take as long as these.
            share = (num_steps + self._num_untimed) / num_steps
            self.seconds += share * taken
            self.cpu_seconds += share * of_cpu
            self._num_untimed = 0
        self.step = mark

    def evaluate(self, measure: Measure) -> Lap:
        """Measures, saves the training's state, and appends a line."""
        assert self._training is not None
        lap = Lap(
            contestant=self.entry.contestant,
            entry=self.entry.entry,
            seed=self.entry.seed,
            step=self.step,
            seconds=round(self.seconds, 4),
            cpu_seconds=round(self.cpu_seconds, 4),
            setup_seconds=round(self._setup, 3),
            distances=measure(self._training, self.entry.seed),
            num_parameters=self._training.num_parameters,
            num_training_only=self._training.num_training_only,
            runs=self._runs(),
            settings=self._plan.settings,
        )
        folder = self._states / str(self.step)
        folder.mkdir(parents=True, exist_ok=True)
        self._training.save(folder)
        append(results_file(self._out), lap)
        self._is_cold = True
        # Only now: a run that is killed before goes on from the earlier state.
        for other in self._states.iterdir():
            if other.name.isdigit() and int(other.name) != self.step:
                shutil.rmtree(other)
        return lap

    def _runs(self) -> list[str]:
        earlier = [] if self._last is None else list(self._last.runs)
        return earlier + [self._plan.run] * (self._plan.run not in earlier)

    def _built(self) -> Training:
        training = self.entry.build()
        if self._last is not None:
            folder = self._states / str(self._last.step)
            if not folder.is_dir():
                raise ValueError(
                    f"{results_file(self._out)} has {self.entry.contestant!r} up to step {self._last.step},"
                    f" but its state is not in {folder}: wanted the whole folder, or another --out"
                )
            training.load(folder)
        return training

    def _synchronize(self) -> None:
        if self._plan.device == "cuda":
            torch.cuda.synchronize()


def race(
    entries: Sequence[Entry],
    plan: Plan,
    measure: Measure,
    out: Path,
    *,
    say: Callable[[str], object] = print,
) -> None:
    """Trains what the results file lacks, turn by turn, and appends a line at each evaluation."""
    runners = [Runner(entry, plan, out) for entry in entries]
    waiting = [runner for runner in runners if not runner.is_done]
    say(f"{len(runners)} trainings of {plan.steps} steps, {len(runners) - len(waiting)} done")
    for number, mark in enumerate(plan.marks):
        for runner in waiting[:: 1 if number % 2 == 0 else -1]:
            if runner.step >= mark:
                continue
            runner.train_to(mark)
            if mark in runner.entry.evaluations(plan.steps):
                lap = runner.evaluate(measure)
                found = "  ".join(f"{name} {lap.in_space(name):.3f}" for name in lap.distances)
                say(f"{lap.contestant:24s} seed {lap.seed} step {mark:6d} {lap.seconds:8.1f} s  {found}")


def paces(entries: Sequence[Entry], device: str) -> dict[str, tuple[float, float]]:
    """Contestant -> seconds to build it with its first step, and median seconds of a step after that.

    Each is built and thrown away.
    """
    found = {}
    for entry in entries:
        times = [time.perf_counter()]
        training = entry.build()
        for _ in range(1 + PACED):
            with training.turn():
                training.step()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter())
        lengths = [after - before for before, after in zip(times, times[1:], strict=False)]
        found[entry.contestant] = (lengths[0], statistics.median(lengths[1:]))
    return found


def steps_of(shares: Sequence[float], steps: int) -> list[int]:
    """Shares of so many steps as whole steps >= 1, rising, each once."""
    return sorted({max(1, round(share * steps)) for share in shares})


def results_file(out: Path) -> Path:
    """Where a race's lines are."""
    return out / "results.jsonl"


def read_laps(out: Path, settings: Mapping[str, Any] | None = None) -> list[Lap]:
    """The lines so far.

    Raises:
        ValueError: a line is none, or was made with other settings than these.
    """
    laps = read_lines(results_file(out), Lap, "benchmarks/race")
    for lap in laps if settings is not None else ():
        assert settings is not None
        others = [name for name in settings if lap.settings.get(name) != settings[name]]
        if others:
            was = {name: lap.settings.get(name) for name in others}
            now = {name: settings[name] for name in others}
            raise ValueError(
                f"{results_file(out)} is of a race with {was}, got {now}: wanted the same, or another --out"
            )
    return laps
