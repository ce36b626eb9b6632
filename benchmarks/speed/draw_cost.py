"""The cost of a batch's timesteps and weights: our policies against the samplers of hosts.

Policies that learn are timed a second time, with the update after each draw.

Dims: B samples.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.peers.training import GUIDED, SPEED, guided_draws, speed_draw
from benchmarks.spread import Spread
from speedit_plugins import NoiseSchedule
from speedit_plugins.policies.build import build_policy

# Counterparts of the hosts' samplers, and the package's own default.
POLICIES = ("uniform", "speed", "speedit", "loss_second_moment")
# Policies that learn, timed with their updates.
LEARNING = ("loss_second_moment", "loss_balanced", "info_noise", "adaptive", "uncertainty")
# Steps of one timing: a round of `adaptive`, and five new tables of the others. Both cost more than a step.
LEARNING_STEPS = 40
Draw = Callable[[int], object]


def measure(hosts: Path, batch_sizes: Sequence[int], repetitions: int) -> dict[int, dict[str, Spread]]:
    """Seconds of a draw by batch size and sampler, all in turn. Hosts without a checkout are left out."""
    draws, steps = samplers(hosts), learning_steps()
    rounds = max(1, repetitions // LEARNING_STEPS)
    return {
        batch_size: {
            **_timed(draws, batch_size, repetitions),
            **_timed(steps, batch_size, rounds, calls=LEARNING_STEPS),
        }
        for batch_size in batch_sizes
    }


def samplers(hosts: Path) -> dict[str, Draw]:
    """Functions by name that take B and draw timesteps and weights on the CPU; ours come first."""
    generator = torch.Generator().manual_seed(0)
    draws: dict[str, Draw] = {}
    for name in POLICIES:
        policy = build_policy(name, NoiseSchedule.linear(), "epsilon")
        draws[f"ours: {name}"] = partial(policy.draw, generator=generator)
    if (hosts / SPEED).is_dir():
        draws["SpeeD reference"] = speed_draw(hosts / SPEED)
    if (hosts / GUIDED).is_dir():
        guided = guided_draws(hosts / GUIDED)
        draws |= {f"guided-diffusion: {name}": draw for name, draw in guided.items()}
    return draws


def learning_steps() -> dict[str, Draw]:
    """Functions by name that take B, draw timesteps, and teach the policy their losses, all on the CPU."""
    return {f"ours: {name}, drawn and taught": _learning_step(name) for name in LEARNING}


def _learning_step(name: str) -> Draw:
    schedule = NoiseSchedule.linear()
    policy, generator = build_policy(name, schedule, "epsilon"), torch.Generator().manual_seed(0)
    loss = schedule.alphas_cumprod  # that of the best prediction of epsilon, for data of variance 1

    def step(batch_size: int) -> None:
        index = policy.draw(batch_size, generator=generator).index
        policy.update(index, loss[index])

    return step


def _timed(draws: dict[str, Draw], batch_size: int, repetitions: int, *, calls: int = 1) -> dict[str, Spread]:
    """Seconds of a call by name, in turn. Each of the repetitions is the mean of some calls."""
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for number in range(repetitions + 1):
        for name in list(draws)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            for _ in range(calls):
                draws[name](batch_size)
            if number > 0:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Spread.of(values) for name, values in seconds.items()}
