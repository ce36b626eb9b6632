"""Which products of a linear layer oneDNN computes faster than torch on this machine.

A product is oneDNN's only where it wins clearly, so that two runs on one machine choose alike. It is timed on
one thread by CPU time, because that hardly depends on what else the machine does. A layer whose products win
is then timed as a whole by wall time, on all threads of the run: it must not be slower than torch's layer.

Dims: N rows, I features in, O features out.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from speedit_plugins.trainer.models.layers.linear import LEAST_WORK, Linear, Products, product

# Torch's seconds over oneDNN's must be above this, in the median of so many pairs of calls. The margin lies
# between what large products reach on an AMD with AVX2, 1.3 at most, and with AVX-512, 1.7 at least. Single
# ratios spread by a fourth on a busy machine (docs/benchmarks/2026-11-26-throughput.md).
MARGIN, NUM_PAIRS = 1.5, 5
# More rows cost time and change no winner; with fewer, oneDNN looks better than it is.
MOST_ROWS = 256


def fastest_products(num_rows: int, num_in: int, num_out: int) -> Products:
    """Times both kernels at (N, I) and (O, I): product by product, then the layer if oneDNN wins any."""
    num_rows = min(num_rows, max(MOST_ROWS, math.ceil(LEAST_WORK / (num_in * num_out))))
    # What a new layer draws for its weights is no part of the run's random numbers.
    with torch.random.fork_rng(devices=()):
        layer = Linear(num_in, num_out)
    x, gradient = torch.ones(num_rows, num_in), torch.ones(num_rows, num_out)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    factors = ((x, weight, bias), (gradient, weight.t(), None), (gradient.t(), x.t(), None))
    with _one_thread():
        chosen = Products(
            *(
                is_clear(ratios(partial(product, *each, onednn=False), partial(product, *each, onednn=True)))
                for each in factors
            )
        )
    if any(chosen) and statistics.median(_layer_ratios(layer, chosen, x, gradient)) > 1:
        return chosen
    return Products()


def is_clear(pairs: Iterator[float]) -> bool:
    """Whether oneDNN wins by the margin; the first pair that it loses ends the timing."""
    won = list(itertools.takewhile(lambda ratio: ratio > 1, pairs))
    return len(won) == NUM_PAIRS and statistics.median(won) > MARGIN


def ratios(
    torchs: Callable[[], object], onednns: Callable[[], object], clock: Callable[[], float] = time.thread_time
) -> Iterator[float]:
    """Torch's seconds over oneDNN's in `NUM_PAIRS` pairs of calls, after a pair that is not timed."""
    torchs()
    onednns()
    for _ in range(NUM_PAIRS):
        start = clock()
        torchs()
        middle = clock()
        onednns()
        # A coarse clock may see no time pass.
        yield (middle - start) / max(clock() - middle, 1e-9)


def _layer_ratios(layer: Linear, chosen: Products, x: Tensor, gradient: Tensor) -> Iterator[float]:
    """Forward and backward of torch's layer over those of the chosen one."""
    x.requires_grad_()

    def step(products: Products) -> None:
        layer.onednn = products
        torch.autograd.grad(layer(x), (x, *layer.parameters()), gradient)

    return ratios(partial(step, Products()), partial(step, chosen), time.perf_counter)


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
