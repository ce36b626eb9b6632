"""Classifier-free guidance, and schedules by which it changes in the course of a sample.

Dims: B batch, C channels; "..." is (H, W) for images or (F, H, W) for videos.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.registry import nearest
from speedit_plugins.trainer.condition import Condition

# model(x, timestep, condition) -> prediction. A condition is labels (B,) or named tensors (B, ...).
Model = Callable[[Tensor, Tensor, Condition], Tensor]

GuidanceSchedule = Callable[[float], float]
"""Which share of the guidance there is at a time, 0 clean and 1 noise: scale 1 + share (s - 1)."""


@dataclass(frozen=True)
class Guided:
    """The model with classifier-free guidance: (x, timestep) -> prediction in the dtype of x.

    `num_timesteps` is the timestep of noise alone, which the schedule's time is relative to.
    """

    model: Model
    condition: Condition
    null_condition: Condition
    scale: float
    channels: int | None
    schedule: GuidanceSchedule | None
    num_timesteps: float

    def __call__(self, x: Tensor, timestep: Tensor) -> Tensor:
        scale = self._scale_at(timestep)
        if scale == 1 or self.condition is None or self.null_condition is None:
            return self.model(x, timestep, self.condition).to(x.dtype)
        both = _one_after_the_other(self.condition, self.null_condition)  # (2B, ...)
        prediction = self.model(torch.cat([x, x]), torch.cat([timestep, timestep]), both)
        # Widened first: otherwise the scale would amplify the rounding of a half-precision difference.
        given, null = prediction.to(x.dtype).chunk(2)
        guided = null + scale * (given - null)
        channels = x.shape[1] if self.channels is None else self.channels
        return torch.cat([guided[:, :channels], given[:, channels:]], dim=1)

    def _scale_at(self, timestep: Tensor) -> float:
        if self.schedule is None:
            return self.scale
        # All samples of a batch are at one timestep.
        return 1 + (self.scale - 1) * self.schedule(float(timestep[0]) / self.num_timesteps)


def power_cosine(time: float, *, power: float) -> float:
    """(1 - cos(pi (1 - time)^power)) / 2: none at noise alone, all of it at clean data.

    Source: MDT, Gao et al. 2023, arXiv:2303.14389, section 4.1.
    """
    return (1 - math.cos(math.pi * (1 - time) ** power)) / 2


def within(time: float, *, interval: tuple[float, float]) -> float:
    """1 if the time is in the interval, both ends included, and 0 elsewhere.

    Source: Kynkaanniemi et al. 2024, arXiv:2404.07724, with time in place of the noise level.
    """
    return float(interval[0] <= time <= interval[1])


def guidance_schedule(
    name: str, *, power: float | None = None, interval: Sequence[float] = ()
) -> GuidanceSchedule | None:
    """The schedule of this name; None is constant guidance.

    Args:
        name: constant, power_cosine or interval.
        power: of power_cosine; None is 4, the default of sail-sg/MDT.
        interval: of interval, two times in [0, 1].

    Raises:
        ValueError: the name is unknown.
    """
    known: dict[str, Callable[[], GuidanceSchedule | None]] = {
        "constant": lambda: None,
        "power_cosine": lambda: partial(power_cosine, power=4.0 if power is None else power),
        "interval": lambda: partial(within, interval=(interval[0], interval[1])),
    }
    if name not in known:
        raise ValueError(
            f"unknown guidance schedule {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}"
        )
    return known[name]()


def check_guidance(guided: Guided, noise: Tensor) -> None:
    """Nothing, if scale, channels and conditions agree.

    Raises:
        ValueError: a value is out of range, an option has no effect, or a condition is missing.
    """
    scale, channels = guided.scale, guided.channels
    condition, null = guided.condition, guided.null_condition
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance_scale needs a finite value >= 0, got {scale}")
    if scale == 1 and channels is not None:
        raise ValueError(f"guidance_channels has no effect at guidance_scale 1: needs None, got {channels}")
    if scale == 1 and guided.schedule is not None:
        raise ValueError("guidance_schedule has no effect at guidance_scale 1: needs None")
    if channels is not None and not 1 <= channels <= noise.shape[1]:
        raise ValueError(f"guidance_channels needs to be in [1, {noise.shape[1]}], got {channels}")
    if scale != 1 and (condition is None or _shapes(condition) != _shapes(null)):
        raise ValueError(
            f"guidance_scale {scale} needs condition and null_condition of the same names and shapes, got"
            f" {_shapes(condition)} and {_shapes(null)}"
        )


def _one_after_the_other(first: Condition, second: Condition) -> Condition:
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        return torch.cat([first, second])
    assert first is not None
    assert second is not None
    return {name: torch.cat([first[name], second[name]]) for name in first}


def _shapes(condition: Condition) -> Any:
    if condition is None or isinstance(condition, Tensor):
        return None if condition is None else tuple(condition.shape)
    return {name: tuple(tensor.shape) for name, tensor in condition.items()}
