"""The tables of docs/planning.md.

Dims: P payload in bytes, n ranks.
"""

from itertools import islice
from pathlib import Path

import pytest

from benchmarks.speed.plan_table import CASES, GPUS, least_seconds, table
from speedit_plugins.trainer.parallel.plan import Transfer

PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
H100, P = GPUS["H100"], 8 * 10**9


def test_a_machine_is_bound_by_nvlink_and_several_by_the_slower_link() -> None:
    alone = least_seconds([Transfer("all-gather", "weights", P, 8)], H100)
    assert alone == pytest.approx(P * 7 / 8 / 450e9)
    # Each machine receives half of the tensor by eight adapters, and each GPU 15 / 16 of it by NVLink.
    two = least_seconds([Transfer("all-gather", "weights", P, 16)], H100)
    assert two == pytest.approx(max(P * 15 / 16 / 450e9, P / 2 / 400e9))
    many = least_seconds([Transfer("all-reduce", "gradients", P, 1024)], H100)
    assert many == pytest.approx(2 * P * 127 / 128 / 400e9)
    # By one GPU of each machine.
    across = least_seconds([Transfer("all-reduce", "gradients, between groups", P, 4)], H100)
    assert across == pytest.approx(2 * P * 3 / 4 / 50e9)


def test_the_page_has_what_the_script_prints() -> None:
    printed = list(islice(table(CASES[0], H100), 15))
    assert printed[-1].startswith("| 64 | ddp |")
    assert "\n".join(printed) in PAGE.read_text()


def test_the_models_have_the_sizes_that_they_are_named_for() -> None:
    page = PAGE.read_text()
    assert "### A video model of 1B\n\n1.01 billion weights" in page
    assert "### A video model of 10B\n\n10.32 billion weights" in page
