"""The numbers that the convergence benchmark is to show: minutes of training, and so a file of its own."""

from collections.abc import Callable
from types import ModuleType

import pytest

Load = Callable[[str], ModuleType]


@pytest.mark.slow
def test_speedit_and_speed_train_faster_than_uniform(load: Load) -> None:
    """Five seeds of the protocol. The bounds are those of the claim; measured are 1.66 and 1.35."""
    Member = load("stacked.training").Member
    members = [Member(policy, seed) for policy in ("uniform", "speedit", "speed") for seed in range(5)]
    results = load("convergence.paired_run").run(members, load("convergence.paired_run").Protocol(), say=None)
    low, high = results.null_band()
    speedit, speed = results.summary("speedit"), results.summary("speed")
    assert low.value <= 1 <= high.value
    assert speedit.mean >= 1.5
    assert speedit.low > high.value, "all of the interval lies outside of what chance gives"
    assert speed.low > 1
