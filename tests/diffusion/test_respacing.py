"""Checks respacing by hand and by invariants; test_diffusion_reference compares it with DiT's code."""

import math

import pytest

from speedit_plugins.trainer.diffusion.respacing import space_timesteps


def test_space_timesteps_equals_cases_done_by_hand() -> None:
    assert space_timesteps(5, "") == [0, 1, 2, 3, 4]
    assert space_timesteps(10, "3") == [0, 4, 9]  # 4.5 rounds to the even 4
    assert space_timesteps(10, "1") == [0]
    assert space_timesteps(11, [2, 3]) == [0, 5, 6, 8, 10]  # parts of 6 and 5 timesteps
    assert space_timesteps(10, "ddim5") == [0, 2, 4, 6, 8]
    assert space_timesteps(1000, "ddim50") == list(range(0, 1000, 20))
    parts = space_timesteps(300, "10,15,20")
    assert [sum(100 * i <= t < 100 * (i + 1) for t in parts) for i in range(3)] == [10, 15, 20]


@pytest.mark.parametrize("count", [2, 3, 25, 250, 999, 1000])
def test_space_timesteps_spreads_evenly_from_end_to_end(count: int) -> None:
    kept = space_timesteps(1000, str(count))
    assert (kept[0], kept[-1], len(kept)) == (0, 999, count)
    gaps = {later - earlier for earlier, later in zip(kept, kept[1:], strict=False)}
    # Rounded multiples of 999 / (count - 1) differ by its floor or ceiling.
    assert gaps <= {math.floor(999 / (count - 1)), math.ceil(999 / (count - 1))}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ("abc", "needs '', 'N', 'N,M,...' or 'ddimN', got 'abc'"),
        ("ddim", "needs an integer stride of 10, got 'ddim'"),
        ("ddim7", "needs an integer stride of 10, got 'ddim7'"),
        ("11", "needs at most 10 in part 0, got 11"),
        ("5,6", "needs at most 5 in part 1, got 6"),
        ("0", r"needs counts >= 0 and one above 0, got \[0\]"),
    ],
)
def test_space_timesteps_says_what_it_wants(sections: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space_timesteps(10, sections)
