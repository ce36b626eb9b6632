"""How few model calls give samples as good as the SpeeD reference's 250 ancestral steps, on digits.

One small DiT is trained. Then both sides sample it from the same noise: the reference with its own
`p_sample_loop` on its schedule of 250 steps, we with each sampler at falling numbers of calls. The training
is on the CPU, whatever the device of the sampling.

Dims: N samples.
"""

import importlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.image_sets import load_image_set
from benchmarks.peers.original_dit import importable
from benchmarks.peers.training import SPEED, SPEED_PACKAGES
from benchmarks.speed.devices import waiting
from benchmarks.stacked.sample_quality import SampleQuality, Sampler
from benchmarks.stacked.training import Member, Shape, StackedTraining, build_model

REFERENCE_CALLS = 250
REFERENCE = "reference"
# Numbers of model calls to try. Each of these samplers calls the model once per step.
CALLS: Mapping[str, tuple[int, ...]] = {
    "ancestral": (250, 100, 50, 25),
    "ddim": (100, 50, 25, 15, 10, 8, 6, 5, 4),
    "dpm": (100, 50, 25, 15, 10, 8, 6, 5, 4),
}
# Seed -> samples (N, C, H, W).
Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class Distances:
    """Squared Fréchet distances to the data by number of calls, one value per noise.

    `seconds` are medians of drawing N samples, by sampler and calls such as "ddim-10"; of the reference by
    "reference".
    """

    reference: tuple[float, ...]
    ours: Mapping[str, Mapping[int, tuple[float, ...]]]
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def level(self) -> float:
        """Up to this distance is as good as the reference: its mean plus a standard deviation over noises."""
        return statistics.mean(self.reference) + statistics.stdev(self.reference)

    def fewest(self, kind: str) -> int | None:
        """Fewest calls for which a sampler's mean distance is at most the level; None if none gets there."""
        tried = self.ours[kind].items()
        return min((calls for calls, values in tried if statistics.mean(values) <= self.level), default=None)


def measure(
    hosts: Path,
    *,
    num_steps: int,
    num_samples: int,
    num_noises: int,
    calls: Mapping[str, Sequence[int]] = CALLS,
    device: str = "cpu",
) -> Distances:
    """Trains for `num_steps`, then samples N images from each noise in every way; at least two noises."""
    data = load_image_set("digits", 8)
    stack = StackedTraining([Member("speedit")], data, "linear", Shape())
    while stack.step < num_steps:
        stack.train_step()
    model = build_model(data, stack.shape).eval()
    model.load_state_dict({**model.state_dict(), **stack.averaged_weights(0)})
    model = model.to(device)
    quality = SampleQuality(data, features="digit_classifier", num_samples=num_samples, device=device)
    clock, seconds = waiting(device), dict[str, float]()

    def ours(name: str) -> Draw:
        return lambda seed: quality.draw(model, stack.process, seed, Sampler.named(name))

    def scored(name: str, draw: Draw) -> tuple[float, ...]:
        found, taken = [], []
        for seed in range(num_noises):
            start = clock()
            samples = draw(seed)
            taken.append(clock() - start)
            found.append(quality.distance(samples.cpu()))
        seconds[name] = statistics.median(taken)
        return tuple(found)

    reference = scored(REFERENCE, _reference(hosts / SPEED, model, quality, device))
    tried = {
        kind: {number: scored(f"{kind}-{number}", ours(f"{kind}-{number}")) for number in numbers}
        for kind, numbers in calls.items()
    }
    return Distances(reference, tried, seconds)


def _reference(checkout: Path, model: nn.Module, quality: SampleQuality, device: str) -> Draw:
    with importable(checkout, bare=SPEED_PACKAGES):
        kind = importlib.import_module("speed.diffusion.iddpm").IDDPM
        diffusion: Any = kind(timestep_respacing=str(REFERENCE_CALLS), learn_sigma=False)

    def draw(seed: int) -> Tensor:
        noise, _ = quality.noise(seed)
        # The reference draws its later noise from the global generator.
        torch.manual_seed(seed)
        return diffusion.p_sample_loop(
            model,
            noise.shape,
            noise,
            clip_denoised=True,
            model_kwargs={"condition": quality.labels},
            device=device,
        )

    return draw
