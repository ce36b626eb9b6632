"""Trains members as paired stacks, evaluates them at some steps, and reads speed-ups from their curves.

Members of one seed share initialisation, data order and noise, also the noise that samples start from. So a
policy is compared with the baseline of the same seed.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.crossing import Reading, Summary, null_band, speed_up, summary
from benchmarks.image_sets import load_image_set
from benchmarks.stacked.sample_quality import SampleQuality
from benchmarks.stacked.training import Member, Shape, StackedTraining

# Shares of the horizon. At 1600: 160, 300, 500, 700, 1000, 1300, 1600 and 2000 steps.
EVALUATED = (0.1, 0.1875, 0.3125, 0.4375, 0.625, 0.8125, 1.0, 1.25)
# In a larger stack the weights no longer fit in the cache, so more members gain nothing.
MAX_STACK = 8
BASELINE = "uniform"


@dataclass(frozen=True)
class Protocol:
    """What all members of a run share.

    Args:
        horizon: S; the distance to reach is the baseline's after S steps. One of `steps`.
        steps: steps of the evaluations, rising; () takes the shares `EVALUATED` of the horizon.
        samplers: see `stacked.sample_quality.Sampler`; tables show the first.
        num_samples: number of samples at each evaluation.
        features: entry of FEATURES; distances are between these features.
        data: see `load_image_set`.
        image_size: edge of the images in pixels.
        schedule: linear, scaled_linear, cosine or rectified_flow.
        shape: shape of a member's model and batch.
        workers: stacks that train at the same time, one thread each; 0 takes as many as torch has threads.
    """

    horizon: int = 1600
    steps: tuple[int, ...] = ()
    samplers: tuple[str, ...] = ("ddim-25",)
    num_samples: int = 500
    features: str = "digit_classifier"
    data: str = "digits"
    image_size: int = 8
    schedule: str = "linear"
    shape: Shape = Shape()
    workers: int = 0

    @property
    def evaluations(self) -> tuple[int, ...]:
        """Steps of the evaluations."""
        return self.steps or tuple(round(share * self.horizon) for share in EVALUATED)


@dataclass(frozen=True)
class Curve:
    """One training: its squared Fréchet distance at each evaluation, by sampler."""

    member: Member
    distances: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Results:
    """The curves of a run in the order of its members, the parameters of a member, and wall-clock seconds."""

    protocol: Protocol
    curves: tuple[Curve, ...]
    num_parameters: int
    seconds: float

    def names(self) -> list[str]:
        """Rows of the table, in the order of the members."""
        return list(dict.fromkeys(curve.member.name for curve in self.curves))

    def distances(self, name: str, sampler: str = "") -> dict[int, tuple[float, ...]]:
        """Distances at the evaluations, by seed; sampler '' is the protocol's first."""
        sampler = sampler or self.protocol.samplers[0]
        return {c.member.seed: c.distances[sampler] for c in self.curves if c.member.name == name}

    def speed_ups(
        self, name: str, *, baseline: str = BASELINE, horizon: int = 0, sampler: str = ""
    ) -> dict[int, Reading]:
        """Speed-up by seed, over the baseline of the same seed; horizon 0 is the protocol's."""
        levels = self.distances(baseline, sampler)
        curves = self.distances(name, sampler)
        if not curves or not curves.keys() <= levels.keys():
            raise ValueError(
                f"a speed-up needs {baseline!r} and {name!r} of the same seeds, got {list(levels)} and"
                f" {list(curves)}"
            )
        return {
            seed: speed_up(self.protocol.evaluations, curve, levels[seed], horizon or self.protocol.horizon)
            for seed, curve in curves.items()
        }

    def summary(self, name: str, **options: Any) -> Summary:
        """Mean speed-up with its bootstrap interval; options as in `speed_ups`."""
        return summary(list(self.speed_ups(name, **options).values()))

    def null_band(
        self, *, baseline: str = BASELINE, horizon: int = 0, sampler: str = ""
    ) -> tuple[Reading, Reading] | None:
        """The range of nine in ten speed-ups of one baseline seed over another; None for a single seed."""
        curves = list(self.distances(baseline, sampler).values())
        return null_band(self.protocol.evaluations, curves, horizon or self.protocol.horizon)


def run(
    members: Sequence[Member], protocol: Protocol, *, say: Callable[[str], object] | None = print
) -> Results:
    """Trains and evaluates all members.

    Args:
        members: any policies, seeds, learning rates and prediction types; each pair of name and seed once.
        protocol: what they share.
        say: called with a line at each evaluation of a stack; None for silence.
    """
    start = time.perf_counter()
    _check(members, protocol)
    data = load_image_set(protocol.data, protocol.image_size)
    quality = SampleQuality(
        data, features=protocol.features, samplers=protocol.samplers, num_samples=protocol.num_samples
    )
    workers = protocol.workers or torch.get_num_threads()
    stacks = [
        StackedTraining(stack, data, protocol.schedule, protocol.shape)
        for stack in stacks_of(members, workers)
    ]

    def trained(number: int) -> list[Curve]:
        def report(text: str) -> None:
            if say is not None:
                say(f"{time.perf_counter() - start:6.0f} s  stack {number + 1} of {len(stacks)}  {text}")

        return _train(stacks[number], quality, protocol.evaluations, report)

    # Threads are enough: operations on a stack take long, and torch releases Python's lock within them.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            curves = [curve for part in pool.map(trained, range(len(stacks))) for curve in part]
    finally:
        torch.set_num_threads(threads)
    by_member = {(curve.member.name, curve.member.seed): curve for curve in curves}
    ordered = tuple(by_member[member.name, member.seed] for member in members)
    num_parameters = sum(p[0].numel() for p in stacks[0].parameters.values())
    return Results(protocol, ordered, num_parameters, time.perf_counter() - start)


def stacks_of(members: Sequence[Member], workers: int) -> list[list[Member]]:
    """Groups members by learning rate and prediction type, in equal parts of at most `MAX_STACK`."""
    groups: dict[tuple[float, str], list[Member]] = {}
    for member in members:
        groups.setdefault((member.lr, member.prediction_type), []).append(member)
    stacks = []
    for group in groups.values():
        # One stack per worker, or a multiple of that, so that no worker idles while the last stack trains.
        num_stacks = min(len(group), workers * math.ceil(len(group) / (workers * MAX_STACK)))
        stacks += [group[number::num_stacks] for number in range(num_stacks)]
    return stacks


def _train(
    stack: StackedTraining,
    quality: SampleQuality,
    evaluations: Sequence[int],
    say: Callable[[str], object],
) -> list[Curve]:
    order = " ".join(f"{member.name}:{member.seed}" for member in stack.members)
    say(f"distances of {order}, under {next(iter(quality.samplers))}")
    distances: list[dict[str, list[float]]] = [{name: [] for name in quality.samplers} for _ in stack.members]
    for step in evaluations:
        while stack.step < step:
            stack.train_step()
        for curve, found in zip(distances, quality.of_stack(stack), strict=True):
            for sampler, distance in found.items():
                curve[sampler].append(distance)
        shown = [f"{curve[next(iter(quality.samplers))][-1]:.2f}" for curve in distances]
        say(f"step {step}: {' '.join(shown)}")
    return [
        Curve(member, {name: tuple(values) for name, values in curve.items()})
        for member, curve in zip(stack.members, distances, strict=True)
    ]


def _check(members: Sequence[Member], protocol: Protocol) -> None:
    if not members:
        raise ValueError("run needs at least one member, got none")
    seen = [(member.name, member.seed) for member in members]
    if len(set(seen)) < len(seen):
        twice = next(pair for pair in seen if seen.count(pair) > 1)
        raise ValueError(f"each member needs a name and seed of its own, got {twice} twice: give a label")
    if rates := [member.lr for member in members if not 0 < member.lr < math.inf]:
        raise ValueError(f"lr needs to be > 0 and finite, got {rates[0]}")
    if seeds := [member.seed for member in members if member.seed < 0]:
        raise ValueError(f"seed needs to be >= 0, got {seeds[0]}")
    if protocol.num_samples < 2 or protocol.workers < 0:
        got = f"{protocol.num_samples} and {protocol.workers}"
        raise ValueError(f"num_samples needs to be >= 2 and workers >= 0, got {got}")
    steps = protocol.evaluations
    if list(steps) != sorted(set(steps)) or steps[0] < 1 or protocol.horizon not in steps:
        raise ValueError(
            f"steps need to rise from 1 or more and hold horizon {protocol.horizon}, got {steps}"
        )
