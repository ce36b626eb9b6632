"""The cost of a batch's timesteps and weights: our policies against the samplers of hosts.

Policies that learn are timed a second time, with the update after each draw. On CUDA a time lasts until the
device has drawn, although a training does not wait for it.

Dims: B samples.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks.peers.training import GUIDED, SPEED, guided_draws, speed_draw
from benchmarks.speed.devices import waiting
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


def measure(
    hosts: Path, batch_sizes: Sequence[int], repetitions: int, *, device: str = "cpu"
) -> dict[int, dict[str, Spread]]:
    """Seconds of a draw by batch size and sampler, all in turn. Hosts without a checkout are left out."""
    draws, steps = samplers(hosts, device), learning_steps(device)
    rounds = max(1, repetitions // LEARNING_STEPS)
    return {
        batch_size: {
            **_timed(draws, batch_size, repetitions, device=device),
            **_timed(steps, batch_size, rounds, calls=LEARNING_STEPS, device=device),
        }
        for batch_size in batch_sizes
    }


def samplers(hosts: Path, device: str = "cpu") -> dict[str, Draw]:
    """Functions by name that take B and draw timesteps and weights on the device; ours come first."""
    generator = torch.Generator(device).manual_seed(0)
    draws: dict[str, Draw] = {}
    for name in POLICIES:
        policy = build_policy(name, NoiseSchedule.linear(), "epsilon")
        draws[f"ours: {name}"] = partial(policy.draw, device=device, generator=generator)
    if (hosts / SPEED).is_dir():
        draws["SpeeD reference"] = speed_draw(hosts / SPEED, device)
    if (hosts / GUIDED).is_dir():
        guided = guided_draws(hosts / GUIDED, device)
        draws |= {f"guided-diffusion: {name}": draw for name, draw in guided.items()}
    return draws


def learning_steps(device: str = "cpu") -> dict[str, Draw]:
    """Functions by name that take B, draw timesteps on the device, and teach the policy their losses."""
    return {f"ours: {name}, drawn and taught": _learning_step(name, device) for name in LEARNING}


def _learning_step(name: str, device: str) -> Draw:
    schedule = NoiseSchedule.linear()
    policy = build_policy(name, schedule, "epsilon")
    generator = torch.Generator(device).manual_seed(0)
    # That of the best prediction of epsilon, for data of variance 1.
    loss = schedule.alphas_cumprod.to(device)

    def step(batch_size: int) -> None:
        index = policy.draw(batch_size, device=device, generator=generator).index
        policy.update(index, loss[index])

    return step


def _timed(
    draws: dict[str, Draw], batch_size: int, repetitions: int, *, calls: int = 1, device: str
) -> dict[str, Spread]:
    """Seconds of a call by name, in turn. Each of the repetitions is the mean of some calls."""
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    clock = waiting(device)
    for number in range(repetitions + 1):
        for name in list(draws)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            for _ in range(calls):
                draws[name](batch_size)
            if number > 0:
                seconds[name].append((clock() - start) / calls)
    return {name: Spread.of(values) for name, values in seconds.items()}
