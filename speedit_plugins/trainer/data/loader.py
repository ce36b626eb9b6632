"""A resumable loader: the batches that follow are a function of (seed, epoch, offset) alone.

Dims: B batch, C channels, H x W pixels.
"""

import hashlib
import os
import signal
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from speedit_plugins.trainer.data.buckets import usable_size, whole_batches

# What a seed is for: the first number of every path given to `stream_seed`, so that no two streams are one.
DATA_STREAM, NOISE_STREAM, IMAGE_STREAM, LABEL_STREAM, TIMESTEP_STREAM, MODEL_STREAM = range(6)

_FAULT = "fault"

# A key names one sample of one pass over the data: (epoch, index).
Key = tuple[int, int]


class SampleSource(Protocol):
    """What the loader needs from a dataset; every random choice of `load` comes from `generator`.

    Where not all samples have one shape, it also has `buckets`, int64 (len,): those of a bucket have.
    """

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> Mapping[str, Any]: ...


class ResumableLoader:
    """Infinite iterator of shuffled batches that continues bit for bit from a saved position.

    Each epoch is one permutation of the dataset, cut into whole batches; the rest of it is dropped. Of each
    batch every rank yields its part. The position counts batches handed out, never batches prefetched: it is
    the same for every number of workers and on every rank, and goes on with any number of ranks.

    With buckets each batch, of all ranks together, is of one bucket, and the rest of every bucket is dropped:
    see `whole_batches`.

    Args:
        dataset: has `__len__` and `load(index, generator)`, and where shapes differ `buckets`.
        batch_size: samples per batch of all ranks together, in [1, len(dataset)].
        seed: >= 0; decides the order and the augmentation of every epoch.
        num_workers: loading processes of this rank; 0 loads in this one.
        prefetch_factor: batches that each worker loads ahead, >= 1; None is torch's own number, 2.
        pin_memory: page-locked batches, for copies to a CUDA device; needs one.
        rank: which of `world_size` equal parts of a batch to yield, in order; world_size divides batch_size.

    Yields:
        The samples of a part stacked key by key: "image" (B, C, H, W), "label" int64 (B,).
    """

    def __init__(  # noqa: PLR0913 - flat, as torch's DataLoader
        self,
        dataset: SampleSource,
        *,
        batch_size: int,
        seed: int = 0,
        num_workers: int = 0,
        prefetch_factor: int | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        size = len(dataset)
        if batch_size < 1:
            raise ValueError(f"the loader needs batch_size >= 1, got {batch_size}")
        if size < batch_size:
            raise ValueError(
                f"the loader needs at least batch_size = {batch_size} samples, got a dataset of {size}"
            )
        if seed < 0:
            raise ValueError(f"the loader needs seed >= 0, got {seed}")
        if num_workers < 0:
            raise ValueError(f"the loader needs num_workers >= 0, got {num_workers}")
        if prefetch_factor is not None and num_workers == 0:
            raise ValueError("prefetch_factor has no effect without workers; wanted num_workers > 0")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"the loader needs rank in [0, world_size) and a batch_size that world_size divides, got rank"
                f" {rank}, world_size {world_size}, batch_size {batch_size}"
            )
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory=True has no effect without a CUDA device; wanted pin_memory=False")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.rank, self.world_size = rank, world_size
        self.pin_memory = pin_memory
        self._buckets: Tensor | None = getattr(dataset, "buckets", None)
        self._usable_size, self._arrangement = _arrangement(self._buckets, size=size, batch_size=batch_size)
        self._epoch = 0
        self._offset = 0
        self._batches: Iterator[dict[str, Tensor]] | None = None

    @property
    def epoch(self) -> int:
        """The pass over the data that the next batch belongs to, from 0."""
        return self._epoch

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass over the data."""
        return self._usable_size // self.batch_size

    def __iter__(self) -> "ResumableLoader":
        return self

    def __next__(self) -> dict[str, Tensor]:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = _checked(next(self._batches))
        except BaseException:
            # The running iterator is past the batch that failed; the next call starts again at the position.
            self.close()
            raise
        self._epoch, self._offset = settle(
            self._epoch, self._offset + self.batch_size, size=self._usable_size, batch_size=self.batch_size
        )
        return batch

    def close(self) -> None:
        """Ends the workers and what they prefetched; the position stays, the next batch starts new ones."""
        batches, self._batches = self._batches, None
        if batches is not None and self.num_workers > 0:
            # Dropping it is not enough: the traceback of an error keeps the iterator, and the next worker to
            # be forked would then inherit it and shut down queues that are not its own.
            batches._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public name for it

    def state_dict(self) -> dict[str, int]:
        """The position as plain ints: seed, epoch, offset (samples of it handed out), size of the dataset.

        With buckets also what arranges an epoch: batch_size and a checksum of the buckets.
        """
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "offset": self._offset,
            "size": len(self.dataset),
            **self._arrangement,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from `state_dict`'s position.

        The batch size may differ from the saved one: the offset counts samples. With buckets it may only at
        the start of an epoch, like the buckets themselves.

        Raises:
            ValueError: a key is missing, unknown or out of range, or seed or dataset size is another one, or,
                within an epoch of buckets, batch size or buckets are.
        """
        wanted = set(self.state_dict())
        if set(state) != wanted:
            raise ValueError(f"the loader's state needs the keys {sorted(wanted)}, got {sorted(state)}")
        for key, value in state.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"the loader's state needs {key} to be an int >= 0, got {value!r}")
        size = len(self.dataset)
        if state["size"] != size:
            raise ValueError(
                f"the saved position is for a dataset of {state['size']} samples, got one of {size}"
            )
        if state["seed"] != self.seed:
            raise ValueError(
                f"the saved position has seed {state['seed']}, got a loader with seed {self.seed}"
            )
        self._check_arrangement(state)
        if state["offset"] > self._usable_size:
            raise ValueError(f"the loader's state needs offset <= {self._usable_size}, got {state['offset']}")
        self.close()
        self._epoch, self._offset = settle(
            state["epoch"], state["offset"], size=self._usable_size, batch_size=self.batch_size
        )

    def _check_arrangement(self, state: Mapping[str, int]) -> None:
        """Raises ValueError unless the saved offset points to the same samples here."""
        for key, value in self._arrangement.items():
            if state["offset"] and state[key] != value:
                raise ValueError(
                    f"the saved position lies within an epoch of buckets with {key} {state[key]},"
                    f" got {value}, which arranges that epoch otherwise; wanted the same one"
                )
        if self._arrangement and state["offset"] % self.batch_size:
            raise ValueError(
                f"the loader's state needs an offset of whole batches of {self.batch_size} with buckets, got"
                f" {state['offset']}"
            )

    def _start(self) -> Iterator[dict[str, Tensor]]:
        """Batches from the current position on."""
        keys = _BatchKeys(
            size=len(self.dataset),
            buckets=self._buckets,
            batch_size=self.batch_size,
            seed=self.seed,
            start=(self._epoch, self._offset),
            part=(self.rank, self.world_size),
        )
        loader: DataLoader[Any] = DataLoader(
            _KeyedSamples(self.dataset, self.seed),  # type: ignore[arg-type]  # keys are pairs, not ints
            batch_sampler=keys,
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch_factor,
            pin_memory=self.pin_memory,
            collate_fn=_collated,
            worker_init_fn=_leave_group_signals_to_trainer,
            # Without a generator of its own the DataLoader draws from the global one.
            generator=torch.Generator().manual_seed(0),
        )
        return iter(loader)


def settle(epoch: int, offset: int, *, size: int, batch_size: int) -> Key:
    """(epoch, offset) of the next whole batch: as given, or the next epoch if too few samples are left."""
    return (epoch, offset) if offset + batch_size <= size else (epoch + 1, 0)


def epoch_order(size: int, *, seed: int, epoch: int) -> Tensor:
    """The order of one epoch: a permutation of range(size), int64 (size,), decided by (seed, epoch)."""
    generator = torch.Generator().manual_seed(stream_seed(seed, DATA_STREAM, epoch))
    return torch.randperm(size, generator=generator)


def stream_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for the stream named by `path`, e.g. (epoch,) or (epoch, index); all values >= 0.

    Hashed, not added up: torch's CPU generator keeps the low 32 bits of a seed, and seeds that differ by a
    constant must not share streams between epochs.
    """
    # A microsecond, where numpy's SeedSequence takes fifteen: there are two per sample and step.
    name = ",".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class _BatchKeys:
    """Endless batches of keys from a position on; of each, part `part[0]` of `part[1]` equal ones.

    A batch is cut from the epoch's order before any sample is read.
    """

    def __init__(
        self,
        *,
        size: int,
        buckets: Tensor | None,
        batch_size: int,
        seed: int,
        start: Key,
        part: tuple[int, int],
    ) -> None:
        self.size = size
        self.buckets = buckets
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.part_size = batch_size // part[1]
        self.skipped = part[0] * self.part_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, offset = self.start
        while True:
            order = epoch_order(self.size, seed=self.seed, epoch=epoch)
            if self.buckets is not None:
                order = whole_batches(order, self.buckets, batch_size=self.batch_size)
            for first in range(offset, len(order) - self.batch_size + 1, self.batch_size):
                own = first + self.skipped
                yield [(epoch, index) for index in order[own : own + self.part_size].tolist()]
            epoch, offset = epoch + 1, 0


def _arrangement(buckets: Tensor | None, *, size: int, batch_size: int) -> tuple[int, dict[str, int]]:
    """Samples of an epoch to cut batches from, and what a position within it depends on with buckets."""
    if buckets is None:
        return size, {}
    if buckets.shape != (size,) or buckets.dtype != torch.int64:
        raise ValueError(
            f"the loader needs buckets of shape ({size},) and type int64, got {tuple(buckets.shape)} and"
            f" {buckets.dtype}"
        )
    usable = usable_size(buckets, batch_size=batch_size)
    if usable == 0:
        raise ValueError(
            f"the loader needs at least batch_size = {batch_size} samples in one bucket, got none that large"
        )
    return usable, {"batch_size": batch_size, "buckets_crc32": zlib.crc32(buckets.numpy().tobytes())}


class _KeyedSamples:
    """Map-style view of a dataset under keys; runs in the workers."""

    def __init__(self, dataset: SampleSource, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key
        generator = torch.Generator().manual_seed(stream_seed(self.seed, DATA_STREAM, epoch, index))
        try:
            return dict(self.dataset.load(index, generator))
        except ValueError as error:
            # As data: out of a worker, an exception arrives wrapped in the worker's traceback.
            return {_FAULT: str(error)}


def _collated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Samples stacked key by key, or the first fault among them."""
    faults = [sample for sample in samples if _FAULT in sample]
    return faults[0] if faults else cast(dict[str, Any], default_collate(samples))


def _checked(batch: dict[str, Any]) -> dict[str, Tensor]:
    if _FAULT in batch:
        raise ValueError(batch[_FAULT])
    return batch


def _leave_group_signals_to_trainer(worker_id: int) -> None:
    """Takes a worker out of the trainer's process group, which gets Ctrl-C and a launcher's SIGTERM.

    The trainer ends its step and saves first; a worker that died under it would raise in the middle of that.
    A SIGTERM to the worker alone still ends it.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
