"""Which kernel wins, for scripted times. No test reads a clock."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pytest
import torch

from speedit_plugins.trainer.models.layers import linear
from speedit_plugins.trainer.models.layers.linear import Linear, Products
from speedit_plugins.trainer.training.products import timing
from speedit_plugins.trainer.training.products.timing import (
    MARGIN,
    NUM_PAIRS,
    fastest_products,
    is_clear,
    ratios,
)

needs_onednn = pytest.mark.skipif(not linear.has_onednn(), reason="this build of torch has no oneDNN product")
WINS, LOSES = (2.0,) * NUM_PAIRS, (0.5,) * NUM_PAIRS


class Time:
    """Scripted seconds that pass when something is called."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


def test_kernels_take_turns_and_the_first_pair_is_not_timed() -> None:
    clock = Time()
    torchs, onednns = iter([100.0, *[6.0] * (NUM_PAIRS - 1), 1.0]), iter([0.5, *[2.0] * NUM_PAIRS])
    found = ratios(partial(clock.spend, torchs), partial(clock.spend, onednns), clock)
    assert list(found) == [*[3.0] * (NUM_PAIRS - 1), 0.5]


def test_a_clock_that_did_not_tick_divides_by_no_zero() -> None:
    assert list(ratios(lambda: None, lambda: None, Time())) == [0.0] * NUM_PAIRS


def test_a_product_wins_by_the_margin_in_the_median() -> None:
    few, many = NUM_PAIRS // 2, NUM_PAIRS // 2 + 1
    above, below = MARGIN * 1.01, MARGIN * 0.99
    assert is_clear(iter([*[above] * many, *[below] * few]))
    assert not is_clear(iter([*[above] * few, *[below] * many]))


def test_a_lost_pair_ends_the_timing() -> None:
    pairs = iter([3.0, 0.9, 3.0, 3.0, 3.0])
    assert not is_clear(pairs)
    assert list(pairs) == [3.0, 3.0, 3.0]


@needs_onednn
@pytest.mark.parametrize(
    ("products", "layer", "expected"),
    [
        ((WINS, WINS, LOSES), (1.1, 0.9, 1.1), Products(forward=True, by_input=True)),
        ((WINS, WINS, WINS), (0.9, 0.9, 3.0), Products()),
        ((LOSES, LOSES, LOSES), None, Products()),
    ],
    ids=["the-layer-too", "the-layer-loses", "no-product"],
)
def test_a_layer_that_is_slower_as_a_whole_stays_torchs(
    products: Sequence[Sequence[float]],
    layer: Sequence[float] | None,
    expected: Products,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = iter([*products, layer])

    def scripted(
        torchs: Callable[[], object], onednns: Callable[[], object], *clock: object
    ) -> Iterator[float]:
        # Both callables work.
        torchs()
        onednns()
        values = next(script)
        assert values is not None
        return iter(values)

    monkeypatch.setattr(timing, "ratios", scripted)
    num_threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert fastest_products(64, 8, 4) == expected
    # The process is unchanged.
    assert torch.get_num_threads() == num_threads
    assert torch.equal(torch.get_rng_state(), state)


@needs_onednn
def test_the_three_products_are_those_of_the_layer_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, monitored = [], linear.product

    def recorded(x: torch.Tensor, weight: torch.Tensor, *rest: object, onednn: bool) -> torch.Tensor:
        assert torch.get_num_threads() == 1
        shapes.append((*x.shape, len(weight)))
        return monitored(x, weight, *rest, onednn=onednn)

    def one_pair(
        torchs: Callable[[], object], onednns: Callable[[], object], *clock: object
    ) -> Iterator[float]:
        torchs()
        yield 0.5

    monkeypatch.setattr(timing, "product", recorded)
    monkeypatch.setattr(timing, "ratios", one_pair)
    monkeypatch.setattr(timing, "LEAST_WORK", 0)
    fastest_products(1000, 8, 4)
    rows = timing.MOST_ROWS
    assert shapes == [(rows, 8, 4), (rows, 4, 8), (4, rows, 8)]
    shapes.clear()
    # With this many rows the layer would take oneDNN.
    monkeypatch.setattr(timing, "LEAST_WORK", 500 * 8 * 4)
    fastest_products(1000, 8, 4)
    assert shapes[0] == (500, 8, 4)
    assert Linear(8, 4).onednn == Products()
