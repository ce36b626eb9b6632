"""The pages of freed blocks stay with the process."""

import os
import platform
import subprocess
import sys

import pytest

from speedit_plugins.trainer.parallel.heap import keep_freed_pages

# Writes and frees a block of 64 MiB fifty times, and counts the page faults of the last twenty. The first
# ones do not count: an aligned block may leave too little room for the next.
FAULTS = """
import resource, torch
from speedit_plugins.trainer.parallel.heap import keep_freed_pages
if {is_kept}:
    assert keep_freed_pages()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(sum([faults() for _ in range(50)][30:]))
"""


def faults(*, is_kept: bool) -> int:
    command = [sys.executable, "-c", FAULTS.format(is_kept=is_kept)]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))
    }
    # A setting of something else does not fix the thresholds.
    environment["GLIBC_TUNABLES"] = "glibc.malloc.arena_max=2"
    done = subprocess.run(command, capture_output=True, check=True, text=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="another C library than glibc 2.35 or later",
)
def test_a_block_that_comes_back_costs_no_page_faults() -> None:
    # The ratio holds for pages of any size.
    assert 20 * faults(is_kept=True) < faults(is_kept=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2:glibc.malloc.mmap_threshold=131072"),
    ],
)
def test_thresholds_of_the_environment_stand(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_pages()


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_pages()
