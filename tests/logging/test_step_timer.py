import sys
from types import FrameType
from typing import Any

import pytest
import torch

from speedit_plugins.trainer.logging import step_timer
from speedit_plugins.trainer.logging.step_timer import PHASES, StepTimer


class Watch:
    """A clock that moves only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(step_timer, "perf_counter", lambda: self.now)

    def wait(self, seconds: float) -> None:
        self.now += seconds


def cpu_timer() -> StepTimer:
    return StepTimer(torch.device("cpu"))


# Powers of two, so that sums and quotients are exact.
def test_a_summary_splits_the_wall_time_and_counts_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, watch = cpu_timer(), Watch(monkeypatch)
    watch.wait(50.0)  # before the first phase: building and resuming do not count as steps
    for _ in range(2):
        for name, seconds in (("data", 0.25), ("forward", 0.5), ("forward", 0.5), ("backward", 1.0)):
            with timer.phase(name):
                watch.wait(seconds)
        watch.wait(1.75)
        timer.step_done(num_samples=16, num_tokens=256)
    assert timer.summary() == {
        "steps_per_second": 0.25,
        "samples_per_second": 4.0,
        "tokens_per_second": 64.0,
        "seconds_per_step": 4.0,
        "time_split": {
            "data": 0.25,
            "encode": 0.0,
            "forward": 1.0,
            "backward": 1.0,
            "optimizer": 0.0,
            "ema": 0.0,
            "other": 1.75,
        },
    }


def test_a_summary_starts_anew_and_time_between_steps_is_other(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, watch = cpu_timer(), Watch(monkeypatch)
    for _ in range(2):
        with timer.phase("ema"):
            watch.wait(1.0)
        timer.step_done(num_samples=1, num_tokens=1)
        row = timer.summary()
        watch.wait(3.0)  # a checkpoint is written after the line was logged
    assert row["time_split"]["ema"] == 1.0
    assert row["time_split"]["other"] == 3.0
    assert row["steps_per_second"] == 0.25


def test_a_block_that_fails_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, watch = cpu_timer(), Watch(monkeypatch)

    def read() -> None:
        with timer.phase("data"):
            watch.wait(2.0)
            raise StopIteration

    with pytest.raises(StopIteration):
        read()
    timer.step_done(num_samples=1, num_tokens=1)
    assert timer.summary()["time_split"]["data"] == 2.0


def test_an_unknown_phase_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown phase 'forwards'; known: data, encode, forward, backward"):
        cpu_timer().phase("forwards")


def test_a_phase_is_a_few_calls() -> None:
    timer, calls = cpu_timer(), 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with timer.phase("forward"):  # what happens at the first phase alone
        pass
    sys.setprofile(count)
    with timer.phase("forward"):
        pass
    sys.setprofile(None)
    # Six calls today, `setprofile` the last, some 0.1 us each. A step has a dozen phases.
    assert calls <= 12


class FakeEvent:
    """A CUDA event on a device whose time is `now`, in seconds. Only a synchronisation makes it readable."""

    now = 0.0
    is_synchronised = False

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: str) -> None:
        assert stream == "stream of cuda:1"
        self.time, FakeEvent.is_synchronised = FakeEvent.now, False

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert FakeEvent.is_synchronised
        return (end.time - self.time) * 1000


def test_on_cuda_events_are_read_once_after_one_synchronisation(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []

    def synchronize(device: torch.device) -> None:
        waits.append(device)
        FakeEvent.is_synchronised = True

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    timer, watch = StepTimer(torch.device("cuda:1")), Watch(monkeypatch)
    for _ in range(2):
        for name in PHASES:
            with timer.phase(name):
                FakeEvent.now += 0.5
        timer.step_done(num_samples=1, num_tokens=1)
    assert waits == []
    watch.wait(8.0)
    split = timer.summary()["time_split"]
    assert waits == [torch.device("cuda:1")]
    assert split == {**dict.fromkeys(PHASES, 0.5), "other": 1.0}


@pytest.mark.gpu
def test_a_cuda_phase_lasts_as_long_as_its_kernels_and_not_as_their_launch() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer, left = StepTimer(device), torch.randn(4096, 4096, device=device)
    left @ left  # loads the kernel
    torch.cuda.synchronize(device)
    with timer.phase("forward"):
        for _ in range(50):
            left @ left
    timer.step_done(num_samples=1, num_tokens=1)
    row = timer.summary()
    # 50 * 2 * 4096^3 FLOPs take 6.9 ms at 1 PFLOP/s. No device is that fast in float32.
    assert row["time_split"]["forward"] > 5e-3
    assert 0 < row["time_split"]["forward"] <= row["seconds_per_step"] * 1.01
