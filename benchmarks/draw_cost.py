"""The cost of a batch's timesteps and weights: our policies against the samplers of hosts.

Dims: B samples.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from peer_training import GUIDED, SPEED, guided_draws, speed_draw
from spread import Spread

from speedit_plugins import NoiseSchedule
from speedit_plugins.policies.build import build_policy

# Counterparts of the hosts' samplers, and the package's own default.
POLICIES = ("uniform", "speed", "speedit", "loss_second_moment")
Draw = Callable[[int], object]


def measure(hosts: Path, batch_sizes: Sequence[int], repetitions: int) -> dict[int, dict[str, Spread]]:
    """Seconds of a draw by batch size and sampler, all in turn. Hosts without a checkout are left out."""
    draws = samplers(hosts)
    return {batch_size: _timed(draws, batch_size, repetitions) for batch_size in batch_sizes}


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


def _timed(draws: dict[str, Draw], batch_size: int, repetitions: int) -> dict[str, Spread]:
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for number in range(repetitions + 1):
        for name in list(draws)[:: 1 if number % 2 == 0 else -1]:
            start = time.perf_counter()
            draws[name](batch_size)
            if number > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: Spread.of(values) for name, values in seconds.items()}
