"""Clocks and memory of a device. CUDA runs behind the CPU, so a time there begins and ends with a wait."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

Clock = Callable[[], float]


@dataclass(frozen=True)
class Setting:
    """Where all sides of a comparison compute, and in which numbers.

    Args:
        device: cpu or cuda.
        precision: fp32 or bf16; bf16 is autocast of the model on every side. Products of fp32 are TF32 on a
            CUDA device that has it, on every side.
        budget_seconds: of the rounds that count. None begins after these, once three are made.
    """

    device: str = "cpu"
    precision: str = "fp32"
    budget_seconds: float = math.inf

    @property
    def num_warm(self) -> int:
        """First rounds that are not counted. CUDA loads kernels and finds the sizes of its pools in them."""
        return 3 if self.device == "cuda" else 1

    def __str__(self) -> str:
        numbers = "fp32 with TF32 products" if self.device == "cuda" else "fp32"
        return f"{self.device}, {numbers if self.precision == 'fp32' else self.precision}"


def allow_tf32() -> None:
    """Makes products and convolutions of fp32 TF32 on CUDA, as the peers' scripts do."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def wait_for(device: str) -> None:
    """Returns when the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def waiting(device: str, clock: Clock = time.perf_counter) -> Clock:
    """The clock, read after the device has done all that it was given."""
    if device != "cuda":
        return clock

    def read() -> float:
        torch.cuda.synchronize()
        return clock()

    return read


class Stopwatch:
    """Seconds in named phases since the last `take`; replaces a `StepTimer`.

    On the CPU they are `clock`'s. On CUDA they are the device's own, between two points of its stream: the
    CPU does not wait for them, and `take` is called after it has waited for the device.
    """

    def __init__(self, clock: Clock, phases: tuple[str, ...], device: str = "cpu") -> None:
        self._clock, self._phases, self._is_cuda = clock, phases, device == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a phase."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def step_done(self, **_: int) -> None:
        """Does nothing: the caller counts the steps."""

    def take(self) -> dict[str, float]:
        """The seconds of the phases, each of which must have been entered. Counting restarts at zero."""
        seconds: dict[str, float] = {}
        for name, start, end in self._spans:
            taken = start.elapsed_time(end) / 1000 if self._is_cuda else end - start
            seconds[name] = seconds.get(name, 0.0) + taken
        self._spans.clear()
        return {name: seconds[name] for name in self._phases}

    def _now(self) -> Any:
        if not self._is_cuda:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Memory:
    """Peak bytes of tensors on CUDA of each side of a comparison, as if it were alone on the device.

    A side's peak is what it holds between its steps, and the most that its last step has on top of that.
    There are none on the CPU.
    """

    def __init__(self, device: str) -> None:
        self._is_cuda = device == "cuda"
        self._held: dict[str, int] = {}
        self.peaks: dict[str, int] = {}

    @contextmanager
    def of(self, side: str) -> Iterator[None]:
        """Entered around all that a side does."""
        if not self._is_cuda:
            yield
            return
        torch.cuda.reset_peak_memory_stats()
        before, held = torch.cuda.memory_allocated(), self._held.get(side, 0)
        yield
        self.peaks[side] = held + torch.cuda.max_memory_allocated() - before
        self._held[side] = held + torch.cuda.memory_allocated() - before
