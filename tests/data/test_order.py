import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speedit_plugins.trainer.data.order import ChunkedOrder


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 12), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_window_has_whole_chunks_and_every_sample_comes_once(
    chunks: list[int], window: int, seed: int
) -> None:
    order = ChunkedOrder(torch.tensor(chunks), window).draw(generator(seed))
    assert sorted(order.tolist()) == list(range(len(chunks)))
    seen = torch.tensor(chunks)[order].tolist()
    # A chunk that is not in use any more does not come back: at most `window` chunks are in use at any place.
    first, last = (
        {chunk: place for place, chunk in pairs} for pairs in (reversed([*enumerate(seen)]), enumerate(seen))
    )
    for place in range(len(seen)):
        assert sum(first[chunk] <= place <= last[chunk] for chunk in set(chunks)) <= window


def test_a_window_of_all_chunks_is_the_order_without_chunks() -> None:
    order = ChunkedOrder(torch.tensor([0, 0, 3, 3, 5]), 3)
    assert torch.equal(order.draw(generator(4)), torch.randperm(5, generator=generator(4)))


def test_chunks_and_samples_of_a_window_are_equally_likely_everywhere() -> None:
    order = ChunkedOrder(torch.arange(6) // 2, 2)
    first = torch.stack([order.draw(generator(seed))[0] for seed in range(3000)]).bincount(minlength=6)
    # 4 sigma of a binomial count: 4 sqrt(3000 / 6 * 5 / 6) = 82.
    assert (first - 500).abs().max() <= 82


def test_the_checksum_follows_chunks_and_window() -> None:
    checksums = {
        ChunkedOrder(torch.tensor(chunks), window).checksum
        for chunks, window in (([0, 0, 1], 1), ([0, 1, 1], 1), ([0, 0, 1], 2))
    }
    assert len(checksums) == 3
