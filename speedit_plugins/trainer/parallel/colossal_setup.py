"""ColossalAI made ready: imported without its warnings, told of its device, allowed on a CPU."""

import importlib
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch


def set_accelerator_of(device: torch.device) -> None:
    """Tells ColossalAI which device to use, before any part of it asks."""
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    if device.type == "cuda":
        set_accelerator("cuda")
        return

    class SynchronousCpu(CpuAccelerator):  # type: ignore[misc]  # ColossalAI has no types
        """A CPU has no streams, and an operation is done when it returns."""

        def synchronize(self, device: Any = None) -> None: ...
        def empty_cache(self) -> None: ...
        def device_count(self) -> int:
            return 1

        def Stream(self, *args: Any, **options: Any) -> None: ...  # noqa: N802 - ColossalAI's name
        def current_stream(self, device: Any = None) -> None: ...
        def stream(self, stream_: Any) -> AbstractContextManager[Any]:
            return nullcontext()

    set_accelerator(SynchronousCpu())


@contextmanager
def any_device_allowed() -> Iterator[None]:
    """Lets ZeRO be built on a CPU: only a check in it asks for a GPU."""
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    check = LowLevelZeroOptimizer._sanity_checks
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    try:
        yield
    finally:
        LowLevelZeroOptimizer._sanity_checks = check


def import_quietly() -> None:
    """Imports ColossalAI without its warnings about absent hardware and older names of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("colossalai.booster.plugin")
    for name in (
        "broadcast_buffers",
        "torch.distributed.all_gather_into_tensor",
        "torch.distributed.reduce_scatter_tensor",
    ):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
