"""What a policy costs in time: steps per second of a single training, and the policy's part of a step."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks.image_sets import ImageSet
from benchmarks.stacked.training import Member, Shape, StackedTraining


@dataclass(frozen=True)
class Pace:
    """A single training on one thread: medians over rounds that time all policies in turn."""

    steps_per_second: float
    policy_microseconds: float


def paces(
    members: Sequence[Member],
    data: ImageSet,
    schedule: str,
    shape: Shape,
    *,
    rounds: int = 9,
    steps: int = 6,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Pace]:
    """The pace of each member, by its name.

    The policy's part is its draw with the weights, and its update after the step.

    Args:
        members: each name once.
        rounds: timings of each member; one more comes before them and is not counted.
        steps: training steps in one timing; the policy's part is timed over 20 times as many.
        clock: returns seconds.
    """
    trainings = {member.name: StackedTraining([member], data, schedule, shape) for member in members}
    for training in trainings.values():
        _teach(training)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in trainings}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number in range(rounds + 1):
            # The order alternates, so that a slow moment of the machine slows all of them.
            for name in sorted(trainings, reverse=number % 2 == 1):
                training = trainings[name]
                whole = _seconds(training.train_step, steps, clock)
                part = _seconds(_follower(training), 20 * steps, clock)
                if number > 0:
                    seconds[name].append((whole, part))
    finally:
        torch.set_num_threads(threads)
    return {
        name: Pace(
            1 / statistics.median(whole for whole, _ in pairs),
            1e6 * statistics.median(part for _, part in pairs),
        )
        for name, pairs in seconds.items()
    }


def _teach(training: StackedTraining) -> None:
    # A policy that learns costs less until it has seen every timestep several times.
    for policy in training.policies:
        index = torch.arange(policy.schedule.num_timesteps)
        for _ in range(10):
            policy.update(index, torch.ones(len(index)))


def _follower(training: StackedTraining) -> Callable[[], object]:
    """Calls the policy as a training loop does once per step."""
    (policy,), batch_size = training.policies, training.shape.batch_size
    generator, loss = torch.Generator(), torch.ones(batch_size)
    step = itertools.count(training.step)

    def follow() -> None:
        policy.advance(next(step))
        draw = policy.draw(batch_size, generator=generator)
        policy.update(draw.index, loss)

    return follow


def _seconds(call: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(times):
        call()
    return (clock() - start) / times
