"""A draw and a loss in the middle of a function: what is edited, and what is refused."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest

from speedit_plugins.hosts.edits.function_edits import InlineDraw, InlineLoss, edited_function

DRAW = InlineDraw("t", ("sample",), ("data",))
LOSS = InlineLoss("sum")


def sample(shift: float | None = None) -> float:
    """A draw."""
    return 1.0 if shift is None else shift


def host(data: int, *, shift: float | None = 2.0) -> list[float]:
    """Draws, shifts, and sums."""
    noise = data
    if shift is not None:
        scale = 1
        t = sample(shift) * scale
    else:
        t = sample()
    offset = 1
    t = t + offset
    time_of_model = t
    t = t * 1000
    return [noise, time_of_model, t, sum([1, 2])]


def nested(data: int) -> float:
    """Draws in a block of its own."""
    for _ in range(1):
        t = sample()
    return t


def used_later(data: int) -> float:
    """Its draw assigns another name, which it uses afterwards."""
    t = scale = sample()
    return t * scale


def failing(data: int) -> float:
    """Raises after its draw."""
    t = sample()
    raise RuntimeError(str(t))  # the line that a traceback names


def closed() -> Callable[[], float]:
    """Makes a function that uses a name of this one."""
    factor = 3

    def inner() -> float:
        t = sample()
        return factor * t

    return inner


class Calls:
    """What an edited function calls."""

    def times(self, hosts_draw: Callable[[], float], data: int) -> float:
        """Ten times the host's draw."""
        return 10 * hosts_draw() + data

    def squared_error(self, function: Callable[..., Any], values: list[int]) -> float:
        """Twice the host's loss."""
        return 2 * function(values)


def test_the_draw_ends_before_the_name_is_used() -> None:
    made = edited_function(host, (DRAW, LOSS), Calls())
    # 10 * (2 + 1) + 7, and only then the model's scale.
    assert made(7) == [7, 37, 37000, 6]
    assert made(7, shift=None) == [7, 27, 27000, 6]
    assert (made.__name__, made.__doc__) == (host.__name__, host.__doc__)
    assert host(7) == [7, 3, 3000, 3]


def test_a_draw_in_a_block() -> None:
    assert edited_function(nested, (DRAW,), Calls())(1) == 11


def test_a_traceback_has_the_hosts_lines() -> None:
    made = edited_function(failing, (DRAW,), Calls())
    with pytest.raises(RuntimeError, match="11") as raised:
        made(1)
    assert (traceback.extract_tb(raised.tb)[-1].line or "").endswith("# the line that a traceback names")


@pytest.mark.parametrize(
    ("function", "places", "message"),
    [
        (used_later, (DRAW,), "used_later uses scale of its draw later"),
        (host, (InlineDraw("t", ("other",)),), "host assigns no 't' by other"),
        (host, (InlineDraw("u", ("sample",)),), "host assigns no 'u' by sample"),
        (host, (InlineLoss("F.mse_loss"),), r"host calls no F\.mse_loss"),
        (closed(), (DRAW,), "uses names of a function around it"),
        (len, (DRAW,), "len has no source that could be edited"),
    ],
)
def test_what_cannot_be_edited(function: Callable[..., Any], places: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edited_function(function, places, Calls())
