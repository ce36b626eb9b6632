import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from speedit_plugins.trainer.data.loader import ResumableLoader, epoch_order, settle, stream_seed


class Numbered:
    """A dataset whose sample i is (i, a random number of its generator) with label i."""

    def __init__(self, size: int, broken: int | None = None) -> None:
        self.size = size
        self.broken = broken

    def __len__(self) -> int:
        return self.size

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        if index == self.broken:
            raise ValueError(f"sample {index} is broken")
        random = torch.rand((), generator=generator)
        return {"image": torch.stack([torch.tensor(float(index)), random]).view(1, 1, 2), "label": index}


def take(loader: Iterator[dict[str, Tensor]], count: int) -> list[dict[str, Tensor]]:
    return [next(loader) for _ in range(count)]


def assert_same(first: list[dict[str, Tensor]], second: list[dict[str, Tensor]]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_batches_are_stacked_and_an_epoch_is_shuffled_without_repeats() -> None:
    loader = ResumableLoader(Numbered(10), batch_size=3, seed=1)
    assert loader.batches_per_epoch == 3
    epochs = []
    for epoch in range(3):
        assert loader.epoch == epoch
        batches = take(loader, 3)
        assert batches[0]["image"].shape == (3, 1, 1, 2)
        assert batches[0]["label"].dtype == torch.int64
        labels = torch.cat([batch["label"] for batch in batches])
        assert len(set(labels.tolist())) == 9  # no repeats; the tenth sample is dropped
        assert torch.equal(labels, epoch_order(10, seed=1, epoch=epoch)[:9])
        epochs.append(labels.tolist())
    assert epochs[0] != epochs[1] != epochs[2]


@given(size=st.integers(1, 200), seed=st.integers(0, 2**64), epoch=st.integers(0, 10**6))
def test_an_epochs_order_is_a_permutation_that_depends_on_its_arguments_only(
    size: int, seed: int, epoch: int
) -> None:
    order = epoch_order(size, seed=seed, epoch=epoch)
    assert torch.equal(order.sort().values, torch.arange(size))
    assert torch.equal(order, epoch_order(size, seed=seed, epoch=epoch))


def test_different_paths_give_different_seeds() -> None:
    # A chance collision among 10,001 random 64-bit values has probability 3e-12.
    seeds = {stream_seed(s, e, i) for s in range(10) for e in range(10) for i in range(100)}
    assert len(seeds) == 10_000
    assert stream_seed(0, 0) not in seeds  # a path and a longer one that begins with it
    # torch uses the low half of a seed: it must differ as well (0.01 chance collisions expected).
    assert len({seed & 0xFFFFFFFF for seed in seeds}) >= 9_999


@pytest.mark.parametrize("num_workers", [0, 2])
def test_continues_bit_for_bit_from_a_saved_position(num_workers: int) -> None:
    whole = take(ResumableLoader(Numbered(11), batch_size=4, seed=5), 9)
    first = ResumableLoader(Numbered(11), batch_size=4, seed=5, num_workers=num_workers)
    assert_same(take(first, 3), whole[:3])
    state = first.state_dict()
    # Two batches per epoch, three taken. Prefetched batches do not move the position.
    assert state == {"seed": 5, "epoch": 1, "offset": 4, "size": 11}
    assert all(type(value) is int for value in state.values())
    second = ResumableLoader(Numbered(11), batch_size=4, seed=5, num_workers=num_workers)
    second.load_state_dict(state)
    assert_same(take(second, 6), whole[3:])
    # Loading a state into a running loader discards its prefetched batches.
    first.load_state_dict({"seed": 5, "epoch": 0, "offset": 4, "size": 11})
    assert_same(take(first, 2), whole[1:3])
    first.close()
    second.close()


@settings(max_examples=50)
@given(data=st.data(), size=st.integers(1, 30), seed=st.integers(0, 2**40))
def test_resuming_at_any_batch_continues_the_stream(data: st.DataObject, size: int, seed: int) -> None:
    batch_size = data.draw(st.integers(1, size))
    cut, total = data.draw(st.integers(0, 10)), 10
    whole = take(ResumableLoader(Numbered(size), batch_size=batch_size, seed=seed), total)
    first = ResumableLoader(Numbered(size), batch_size=batch_size, seed=seed)
    head = take(first, cut)
    second = ResumableLoader(Numbered(size), batch_size=batch_size, seed=seed)
    second.load_state_dict(first.state_dict())
    assert_same(head + take(second, total - cut), whole)


@settings(max_examples=50)
@given(data=st.data(), worlds=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 2**40))
def test_ranks_together_yield_the_batches_of_one_process_even_if_their_number_changes(
    data: st.DataObject, worlds: tuple[int, int], seed: int
) -> None:
    batch_size = math.lcm(*worlds) * data.draw(st.integers(1, 3))
    size, total = data.draw(st.integers(batch_size, 5 * batch_size)), 8
    cut = data.draw(st.integers(0, total))

    def ranks(world_size: int) -> list[ResumableLoader]:
        return [
            ResumableLoader(
                Numbered(size), batch_size=batch_size, seed=seed, rank=rank, world_size=world_size
            )
            for rank in range(world_size)
        ]

    def together(loaders: list[ResumableLoader], count: int) -> list[dict[str, Tensor]]:
        parts = [[next(loader) for loader in loaders] for _ in range(count)]
        return [{key: torch.cat([part[key] for part in row]) for key in row[0]} for row in parts]

    first, second = ranks(worlds[0]), ranks(worlds[1])
    head = together(first, cut)
    states = [loader.state_dict() for loader in first]
    assert all(state == states[0] for state in states)
    for loader in second:
        loader.load_state_dict(data.draw(st.sampled_from(states)))
    whole = take(ResumableLoader(Numbered(size), batch_size=batch_size, seed=seed), total)
    assert_same(head + together(second, total - cut), whole)


def test_augmentation_depends_on_seed_epoch_and_index_only() -> None:
    def augmentation(seed: int, batch_size: int) -> dict[int, list[float]]:
        loader = ResumableLoader(Numbered(6), batch_size=batch_size, seed=seed)
        found: dict[int, list[float]] = {}
        for batch in take(loader, 12 // batch_size):
            for index, value in batch["image"].flatten(start_dim=1).tolist():
                found.setdefault(int(index), []).append(value)
        return found

    reference = augmentation(seed=2, batch_size=3)
    assert augmentation(seed=2, batch_size=2) == reference
    # The 12 numbers of two epochs all differ (uniform float32, chance collision 1e-5).
    assert len({value for values in reference.values() for value in values}) == 12
    assert all(augmentation(seed=3, batch_size=3)[index] != reference[index] for index in reference)


def test_another_batch_size_continues_after_the_samples_already_seen() -> None:
    first = ResumableLoader(Numbered(12), batch_size=4, seed=0)
    take(first, 2)
    second = ResumableLoader(Numbered(12), batch_size=2, seed=0)
    second.load_state_dict(first.state_dict())
    labels = torch.cat([batch["label"] for batch in take(second, 2)])
    assert torch.equal(labels, epoch_order(12, seed=0, epoch=0)[8:])
    assert settle(3, 8, size=12, batch_size=5) == (4, 0)
    assert settle(3, 7, size=12, batch_size=5) == (3, 7)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failing_batch_does_not_move_the_position(num_workers: int) -> None:
    loader = ResumableLoader(Numbered(4, broken=2), batch_size=4, seed=0, num_workers=num_workers)
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 2 is broken"):
            next(loader)
        assert loader.state_dict()["epoch"] == 0
    loader.dataset = Numbered(4)
    loader.close()
    assert torch.equal(next(loader)["label"], epoch_order(4, seed=0, epoch=0))
    loader.close()


def test_workers_survive_a_signal_to_the_group_and_end_with_their_parent() -> None:
    # Like the trainer, the parent only records the signals and continues. It never closes the loader.
    script = """
import os, signal, torch
from speedit_plugins.trainer.data.loader import ResumableLoader, epoch_order

class Labels:
    def __len__(self):
        return 8

    def load(self, index, generator):
        return {"label": index}

caught = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: caught.append(number))
loader = ResumableLoader(Labels(), batch_size=8, num_workers=2)
for epoch in range(2):  # one batch per worker, so both are running
    next(loader)
os.killpg(0, signal.SIGINT)
os.killpg(0, signal.SIGTERM)
for epoch in range(2, 20):
    assert torch.equal(next(loader)["label"], epoch_order(8, seed=0, epoch=epoch))
assert sorted(caught) == [signal.SIGINT, signal.SIGTERM], caught
print("done", flush=True)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    take(ResumableLoader(Numbered(4), batch_size=2), 5)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size >= 1, got 0"),
        ({"batch_size": 5}, "at least batch_size = 5 samples, got a dataset of 4"),
        ({"batch_size": 2, "seed": -1}, "seed >= 0, got -1"),
        ({"batch_size": 2, "num_workers": -1}, "num_workers >= 0, got -1"),
        ({"batch_size": 2, "prefetch_factor": 4}, "prefetch_factor has no effect without workers"),
        ({"batch_size": 3, "world_size": 2}, "got rank 0, world_size 2, batch_size 3"),
        ({"batch_size": 2, "rank": 2, "world_size": 2}, "got rank 2, world_size 2, batch_size 2"),
        ({"batch_size": 2, "rank": -1}, "got rank -1, world_size 1, batch_size 2"),
        ({"batch_size": 2, "world_size": 0}, "got rank 0, world_size 0, batch_size 2"),
    ],
)
def test_bad_arguments_say_what_is_wanted(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResumableLoader(Numbered(4), **options)


def test_prefetch_factor_does_not_change_the_batches() -> None:
    loader = ResumableLoader(Numbered(11), batch_size=4, seed=5, num_workers=1, prefetch_factor=4)
    assert_same(take(loader, 5), take(ResumableLoader(Numbered(11), batch_size=4, seed=5), 5))
    assert loader.state_dict() == {"seed": 5, "epoch": 2, "offset": 4, "size": 11}
    loader.close()


@pytest.mark.skipif(torch.cuda.is_available(), reason="pinned memory works with a GPU")
def test_pinned_memory_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="pin_memory=True needs a CUDA device, got none"):
        ResumableLoader(Numbered(4), batch_size=2, pin_memory=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 5}, "other data: there were 5 samples and are 4"),
        ({"seed": 1}, "belongs to seed 1, got a loader with seed 0"),
        ({"offset": 6}, "offset <= 4, got 6"),
        ({"offset": -2}, "offset to be an int >= 0, got -2"),
        ({"epoch": 1.0}, "epoch to be an int >= 0, got 1.0"),
        ({"rank": 0}, r"needs the keys \['epoch', 'offset', 'seed', 'size'\]"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    loader = ResumableLoader(Numbered(4), batch_size=2)
    next(loader)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=message):
        loader.load_state_dict({**state, **change})
    assert loader.state_dict() == state


class Faulty:
    def __len__(self) -> int:
        return 4

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        raise ValueError("corrupt image cat.png")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_damaged_data_raise_the_same_error_with_and_without_workers(num_workers: int) -> None:
    loader = ResumableLoader(Faulty(), batch_size=2, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"^corrupt image cat.png$"):
        next(loader)
