"""The memory of a training step on the CPU, kept by the process from one step to the next."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt, from its malloc.h, and the variables that set them for a process.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")
_NEVER = -1
# Bytes from which a block is the kernel's own mapping; glibc before 2.35 takes no more than 32 MiB.
_LARGEST = (2**30, 2**25)


def keep_freed_pages() -> bool:
    """Lets glibc keep what a step frees for the next one, in blocks below 1 GiB (32 MiB before glibc 2.35).

    As it comes it hands much of that back to the kernel, which clears each page anew, step after step. So the
    process stays as large as its largest step was. Measured in docs/benchmarks/2026-11-26-throughput.md.

    Returns:
        Whether it does: False beside another C library, and where the environment sets these thresholds.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = any(name in os.environ for name in _VARIABLES) or any(name in tunables for name in _TUNABLES)
    if sys.platform != "linux" or is_set:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # The first alone would fix the second at 128 KiB.
    is_taken = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return is_taken and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
