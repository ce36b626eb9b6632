"""Times the phases of a training step."""

from time import perf_counter
from types import TracebackType
from typing import Any, Protocol

import torch

PHASES = ("data", "encode", "forward", "backward", "optimizer", "ema")


class StepTimer:
    """Times the phases of this process's steps, from the first phase on.

    On CUDA a phase is the time between two points of the current stream, which it does not wait for: `data`
    is how long the device stands idle because of it.

    Args:
        device: where the steps compute.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        is_cuda = device.type == "cuda"
        self._phases: dict[str, _Phase] = {
            name: _CudaPhase(device) if is_cuda else _CpuPhase() for name in PHASES
        }
        self._began: float | None = None
        self._num_steps = self._num_samples = self._num_tokens = 0

    def phase(self, name: str) -> "_Phase":
        """A context manager that adds the time of its block to a phase; phases do not nest.

        Raises:
            ValueError: the name is none of PHASES.
        """
        if self._began is None:
            self._began = perf_counter()
        if name not in self._phases:
            raise ValueError(f"unknown phase {name!r}; known: {', '.join(PHASES)}")
        return self._phases[name]

    def step_done(self, *, num_samples: int, num_tokens: int) -> None:
        """Counts one optimizer step, with the samples and tokens of all ranks."""
        self._num_steps += 1
        self._num_samples += num_samples
        self._num_tokens += num_tokens

    def summary(self) -> dict[str, Any]:
        """Times of the steps since the last call; at least one step is needed. Waits for a CUDA device.

        Returns:
            `steps_per_second`, `samples_per_second`, `tokens_per_second` and `seconds_per_step` of wall time,
            and `time_split`: seconds per step of each phase of this process, and of `other`, what lies
            between them (logging, checkpoints, grids).
        """
        assert self._began is not None, "a summary follows a step"
        assert self._num_steps, "a summary follows a step"
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        seconds = now - self._began
        split = {name: phase.take_seconds() / self._num_steps for name, phase in self._phases.items()}
        row = {
            "steps_per_second": self._num_steps / seconds,
            "samples_per_second": self._num_samples / seconds,
            "tokens_per_second": self._num_tokens / seconds,
            "seconds_per_step": seconds / self._num_steps,
            "time_split": {**split, "other": seconds / self._num_steps - sum(split.values())},
        }
        self._began = now
        self._num_steps = self._num_samples = self._num_tokens = 0
        return row


class _Phase(Protocol):
    """One of PHASES: a context manager that can be entered repeatedly."""

    def __enter__(self) -> None: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def take_seconds(self) -> float: ...


class _CpuPhase:
    def __init__(self) -> None:
        self._seconds = self._entered = 0.0

    def __enter__(self) -> None:
        self._entered = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds += perf_counter() - self._entered

    def take_seconds(self) -> float:
        """The time since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class _CudaPhase:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._starts: list[torch.cuda.Event] = []
        self._ends: list[torch.cuda.Event] = []

    def __enter__(self) -> None:
        self._starts.append(self._mark())

    def __exit__(self, *_: object) -> None:
        self._ends.append(self._mark())

    def take_seconds(self) -> float:
        """The time since the last call. The device must have reached the last event."""
        seconds = sum(
            start.elapsed_time(end) / 1000 for start, end in zip(self._starts, self._ends, strict=True)
        )
        self._starts.clear()
        self._ends.clear()
        return seconds

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
