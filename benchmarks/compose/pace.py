"""How long a step of each arm takes over a step of the base, timed in turn in one process.

On one thread the process's own clock is used. It does not run while other processes do, so the ratios hold
on a busy machine too. With more threads it is the wall's clock.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch

from benchmarks.compose.arms import BASE, Arm
from benchmarks.compose.results import Pace
from benchmarks.compose.training import Cell, built
from benchmarks.spread import Spread
from speedit_plugins.trainer.training.trainer import Trainer

# Steps before the first timed one: `auto` measures the data, and caches are filled.
WARM_UP = 3


def paces(
    cell: Cell, arms: Sequence[Arm], rounds: int, *, say: Callable[[str], object], revision: str
) -> list[Pace]:
    """The pace of each arm that can be built; the base is timed in any case.

    Args:
        cell: data set and process.
        arms: without repetition.
        rounds: timed steps of each arm, in alternating order.
        say: told of the arms that are left out.
        revision: of the code.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with ExitStack() as stack:
        trainers: dict[str, Trainer] = {}
        by_name = {arm.name: arm for arm in (Arm(), *arms)}
        for arm in by_name.values():
            try:
                trainers[arm.name], _ = stack.enter_context(built(cell, arm, seed=0))
            except (ValueError, TypeError) as error:
                say(f"{cell}: {arm.name} is left out: {str(error).splitlines()[0][:160]}")
        early = ratios(trainers, rounds, clock)
        changing = {name: trainers[name] for name in trainers if by_name[name].until < 1 or name == BASE}
        for trainer in changing.values():
            # The learning rate and the accelerations depend on the step alone.
            trainer.step = cell.settings.horizon - rounds - WARM_UP
        late = ratios(changing, rounds, clock) if len(changing) > 1 else {}
        base = early.pop("")
    found = []
    for name, ratio in early.items():
        found.append(
            Pace(
                data=cell.data,
                process=cell.process,
                arm=name,
                config=cell.training(by_name[name], 0).config,
                early=round(ratio.median, 4),
                late=round(late.get(name, ratio).median, 4),
                spread=[round(ratio.low, 4), round(ratio.high, 4)],
                until=by_name[name].until,
                base_seconds=round(base.median, 5),
                revision=revision,
            )
        )
    return found


def ratios(trainers: Mapping[str, Trainer], rounds: int, clock: Callable[[], float]) -> dict[str, Spread]:
    """Seconds of a step over the base's in the same round, by name; the base's own seconds under ''."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + WARM_UP):
        for name in list(trainers)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            trainers[name].optimizer_step()
            if number >= WARM_UP:
                seconds[name].append(clock() - start)
    base = seconds[BASE]
    found = {
        name: Spread.of([ours / theirs for ours, theirs in zip(values, base, strict=True)])
        for name, values in seconds.items()
    }
    return {**found, "": Spread.of(base)}
