"""Keeps the memory of a training step on the CPU in the process, for the next step."""

import ctypes
import os
import sys

# Parameters of glibc's mallopt, from its malloc.h, and the variables that set them for a process.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
_TUNABLES = ("glibc.malloc.trim_threshold", "glibc.malloc.mmap_threshold")
_NEVER = -1
# Blocks of at least so many bytes get a mapping of their own. glibc before 2.35 accepts at most 32 MiB.
_LARGEST = (2**30, 2**25)


def keep_freed_pages() -> bool:
    """Makes glibc keep what a step frees for the next step, in blocks below 1 GiB (32 MiB before glibc 2.35).

    By default glibc returns much of it to the kernel, and the kernel clears every page again in each step.
    The price: the process stays as large as its largest step. Measured in
    docs/benchmarks/2026-11-26-throughput.md.

    Returns:
        Whether glibc keeps it. False with another C library, and if the environment sets these thresholds.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_set = any(name in os.environ for name in _VARIABLES) or any(name in tunables for name in _TUNABLES)
    if sys.platform != "linux" or is_set:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # Setting the trim threshold alone would fix the mapping threshold at 128 KiB.
    is_taken = any(mallopt(_MMAP_THRESHOLD, size) for size in _LARGEST)
    return is_taken and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
