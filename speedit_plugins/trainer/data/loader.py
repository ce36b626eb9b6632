"""A resumable data loader: the batches depend only on (seed, epoch, offset).

Dims: B batch, C channels, H x W pixels.
"""

import hashlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from speedit_plugins.trainer.data.buckets import usable_size, whole_batches
from speedit_plugins.trainer.data.identity import Identified, Identity, position_in
from speedit_plugins.trainer.data.order import ChunkedOrder
from speedit_plugins.trainer.data.workers import (
    DataError,
    batch_fault,
    deaths_wait_for_their_batch,
    leave_group_signals_to_trainer,
    sample_fault,
)
from speedit_plugins.trainer.terminal import say

# The first number of every path given to `stream_seed`: it keeps the random streams of each purpose apart.
DATA_STREAM, NOISE_STREAM, IMAGE_STREAM, LABEL_STREAM, TIMESTEP_STREAM, MODEL_STREAM = range(6)
HELD_OUT_STREAM, VALIDATION_STREAM, HOLE_STREAM, AUGMENTATION_STREAM, STAGE_STREAM = range(6, 11)

_FAULT = "fault"

# (epoch, index): one sample in one pass over the data.
Key = tuple[int, int]


class SampleSource(Protocol):
    """What the loader needs from a dataset.

    `load` takes all its random numbers from `generator`. A dataset with samples of several shapes also has
    the attribute `buckets`, int64 (len,); samples of the same bucket have the same shape.

    A dataset may also have:

    - `identity()`, what it consists of, see `identity.py`: a resumed run compares it with the saved one;
    - `chunked`, a `ChunkedOrder`, if it is read fastest in chunks;
    - `classes`, a tuple of names;
    - `left_out`, a mapping from a reason, such as the suffix ".gif", to the number of files not used;
    - `num_corrupt`, the number of damaged samples that were found so far, by all workers.
    """

    def __len__(self) -> int: ...

    def load(self, index: int, generator: torch.Generator) -> Mapping[str, Any]: ...


class ResumableLoader:
    """Infinite iterator of shuffled batches that continues bit for bit from a saved position.

    Each epoch is one permutation of the dataset, cut into whole batches; leftover samples are dropped. Every
    rank yields its share of each batch. The position counts batches handed out, not batches prefetched. It is
    therefore the same on every rank and for any number of workers, and training may resume with another
    number of ranks.

    With buckets, all samples of a batch come from one bucket, on all ranks. Leftover samples of each bucket
    are dropped; see `whole_batches`.

    Args:
        dataset: has `__len__`, `load(index, generator)` and, if sample shapes differ, `buckets`.
        batch_size: samples per batch over all ranks, in [1, len(dataset)].
        seed: >= 0; decides the order and the augmentation of every epoch.
        num_workers: loading processes of this rank; 0 loads in the main process.
        prefetch_factor: batches that each worker loads ahead, >= 1; None uses torch's default, 2.
        pin_memory: puts batches into page-locked memory for faster copies to a CUDA device; requires one.
        rank: this process yields part number `rank` of each batch, in [0, world_size).
        world_size: number of equal parts that a batch is split into; must divide batch_size.
        accept_changed: go on from a saved position of other data, at the start of the next epoch.
        is_silent: leave it to another rank to say what changed; None leaves it to rank 0.

    Yields:
        The samples of one part, stacked by key: "image" (B, C, H, W), "label" int64 (B,).
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
        accept_changed: bool = False,
        is_silent: bool | None = None,
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
            raise ValueError("prefetch_factor has no effect without workers: needs num_workers > 0, got 0")
        if not 0 <= rank < world_size or batch_size % world_size:
            raise ValueError(
                f"the loader needs rank in [0, world_size) and a batch_size divisible by world_size, got rank"
                f" {rank}, world_size {world_size}, batch_size {batch_size}"
            )
        if pin_memory and not torch.cuda.is_available():
            raise ValueError("pin_memory=True needs a CUDA device, got none: set pin_memory=False")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.prefetch_factor = prefetch_factor
        self.rank, self.world_size = rank, world_size
        self.pin_memory = pin_memory
        self._buckets: Tensor | None = getattr(dataset, "buckets", None)
        self._chunked: ChunkedOrder | None = getattr(dataset, "chunked", None)
        self._usable_size, self._arrangement = _arrangement(
            self._buckets, self._chunked, size=size, batch_size=batch_size
        )
        self._accept_changed = accept_changed
        self._is_silent = rank > 0 if is_silent is None else is_silent
        self._identity: Identity | None = dataset.identity() if isinstance(dataset, Identified) else None
        self._epoch = 0
        self._offset = 0
        self._batches: Iterator[dict[str, Tensor]] | None = None

    @property
    def epoch(self) -> int:
        """Epoch of the next batch, counted from 0."""
        return self._epoch

    @property
    def batches_per_epoch(self) -> int:
        """Number of whole batches in one epoch."""
        return self._usable_size // self.batch_size

    def __iter__(self) -> "ResumableLoader":
        return self

    def __next__(self) -> dict[str, Tensor]:
        """The next batch.

        Raises:
            DataError: a sample cannot be loaded, or a loading process ended.
        """
        try:
            if self._batches is None:
                self._batches = self._start()
            batch = _checked(next(self._batches))
        except BaseException as error:
            fault = batch_fault(error, getattr(self._batches, "_workers", ()))
            # The iterator is already past the failed batch; the next call restarts from the saved position.
            self.close()
            if fault is not None:
                raise fault from error
            raise
        self._epoch, self._offset = settle(
            self._epoch, self._offset + self.batch_size, size=self._usable_size, batch_size=self.batch_size
        )
        return batch

    def close(self) -> None:
        """Stops the workers and discards prefetched batches; the next batch continues from the position."""
        batches, self._batches = self._batches, None
        if batches is not None and self.num_workers > 0:
            # Dropping the reference is not enough: the traceback of an error keeps the iterator alive. The
            # next forked worker would inherit it and shut down queues that belong to another process.
            batches._shutdown_workers()  # type: ignore[attr-defined]  # torch has no public name for it

    @property
    def identity(self) -> Identity | None:
        """What the dataset consists of, see `identity.py`; None if it does not say."""
        return self._identity

    def state_dict(self) -> dict[str, Any]:
        """The position as plain ints: seed, epoch, offset (samples of the epoch handed out), dataset size.

        With buckets it also has batch_size and a checksum of the buckets: the order of an epoch depends on
        both. With chunks it has a checksum of these. "identity" is that of the dataset, if it has one.
        """
        return {**self._position(), **({} if self._identity is None else {"identity": self._identity})}

    def _position(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "epoch": self._epoch,
            "offset": self._offset,
            "size": len(self.dataset),
            **self._arrangement,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a position saved by `state_dict`.

        The batch size may differ from the saved one, because the offset counts samples. With buckets, the
        batch size and the buckets may change only at the start of an epoch, and so may chunks.

        The data must have the same number of samples, names and classes, unless `accept_changed`. Then
        training goes on with the next epoch. Rank 0 prints a line for other changes, such as edited captions.

        Raises:
            ValueError: a key is missing, unknown or out of range; the seed or the data differ; or the batch
                size or the buckets differ in the middle of an epoch.
        """
        state = dict(state)
        identity = state.pop("identity", None)
        wanted = set(self._position())
        if set(state) != wanted:
            raise ValueError(f"the loader's state needs the keys {sorted(wanted)}, got {sorted(state)}")
        for key, value in state.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"the loader's state needs {key} to be an int >= 0, got {value!r}")
        if state["seed"] != self.seed:
            raise ValueError(
                f"the saved position belongs to seed {state['seed']}, got a loader with seed {self.seed}"
            )
        data = (len(self.dataset), self._identity, self.dataset)
        state, notes = position_in(
            state, identity, data, arrangement=self._arrangement, accept_changed=self._accept_changed
        )
        for note in () if self._is_silent else notes:
            say(note)
        self._check_arrangement(state)
        if state["offset"] > self._usable_size:
            raise ValueError(f"the loader's state needs offset <= {self._usable_size}, got {state['offset']}")
        self.close()
        self._epoch, self._offset = settle(
            state["epoch"], state["offset"], size=self._usable_size, batch_size=self.batch_size
        )

    def _check_arrangement(self, state: Mapping[str, int]) -> None:
        """Raises ValueError if the saved offset would point to other samples in this loader."""
        for key, value in self._arrangement.items():
            if state["offset"] and state[key] != value:
                what = "chunks" if key == "chunks_crc32" else "buckets"
                raise ValueError(
                    f"the saved position is in the middle of an epoch with {what} and {key} {state[key]},"
                    f" got {key} {value}: it must stay the same until the epoch ends, as it decides the order"
                )
        if self._buckets is not None and state["offset"] % self.batch_size:
            raise ValueError(
                f"with buckets the loader's state needs an offset that is a multiple of the batch size"
                f" {self.batch_size}, got {state['offset']}"
            )

    def _start(self) -> Iterator[dict[str, Tensor]]:
        """Iterator over the batches, starting at the current position."""
        keys = _BatchKeys(
            size=len(self.dataset),
            buckets=self._buckets,
            chunked=self._chunked,
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
            worker_init_fn=leave_group_signals_to_trainer,
            # Otherwise the DataLoader would consume random numbers of the global generator.
            generator=torch.Generator().manual_seed(0),
        )
        with deaths_wait_for_their_batch():
            return iter(loader)


def settle(epoch: int, offset: int, *, size: int, batch_size: int) -> Key:
    """(epoch, offset) of the next whole batch: unchanged, or the next epoch if too few samples are left."""
    return (epoch, offset) if offset + batch_size <= size else (epoch + 1, 0)


def epoch_order(size: int, *, seed: int, epoch: int, chunked: ChunkedOrder | None = None) -> Tensor:
    """Shuffled sample order of one epoch, int64 (size,).

    A permutation that depends on (seed, epoch) only, and on the chunks if there are any.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, DATA_STREAM, epoch))
    return torch.randperm(size, generator=generator) if chunked is None else chunked.draw(generator)


def stream_seed(seed: int, *path: int) -> int:
    """A 64-bit seed for the random stream named by `path`, e.g. (epoch,) or (epoch, index); values >= 0.

    The values are hashed rather than summed, so that different paths or seeds never give the same stream.
    torch's CPU generator only uses the low 32 bits of a seed.
    """
    # Takes 1 microsecond; numpy's SeedSequence takes 15. It is called twice per sample and step.
    name = ",".join(map(str, (seed, *path)))
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


class _BatchKeys:
    """Infinite batches of keys from a position on, restricted to this rank's share.

    Each batch is split into `part[1]` equal parts; this yields part number `part[0]`. The keys depend only
    on the epoch's order, never on the contents of samples.
    """

    def __init__(
        self,
        *,
        size: int,
        buckets: Tensor | None,
        chunked: ChunkedOrder | None,
        batch_size: int,
        seed: int,
        start: Key,
        part: tuple[int, int],
    ) -> None:
        self.size = size
        self.buckets, self.chunked = buckets, chunked
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.part_size = batch_size // part[1]
        self.skipped = part[0] * self.part_size

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, offset = self.start
        while True:
            order = epoch_order(self.size, seed=self.seed, epoch=epoch, chunked=self.chunked)
            if self.buckets is not None:
                order = whole_batches(order, self.buckets, batch_size=self.batch_size)
            for first in range(offset, len(order) - self.batch_size + 1, self.batch_size):
                own = first + self.skipped
                yield [(epoch, index) for index in order[own : own + self.part_size].tolist()]
            epoch, offset = epoch + 1, 0


def _arrangement(
    buckets: Tensor | None, chunked: ChunkedOrder | None, *, size: int, batch_size: int
) -> tuple[int, dict[str, int]]:
    """Number of samples used per epoch, and the state entries of the chunks and buckets."""
    order = {} if chunked is None else {"chunks_crc32": chunked.checksum}
    if buckets is None:
        return size, order
    if buckets.shape != (size,) or buckets.dtype != torch.int64:
        raise ValueError(
            f"the loader needs buckets int64 of shape ({size},), got {buckets.dtype} of shape"
            f" {tuple(buckets.shape)}"
        )
    usable = usable_size(buckets, batch_size=batch_size)
    if usable == 0:
        raise ValueError(
            f"the loader needs a bucket with at least batch_size = {batch_size} samples, got none"
        )
    crc = zlib.crc32(buckets.numpy().tobytes())
    return usable, {"batch_size": batch_size, "buckets_crc32": crc, **order}


class _KeyedSamples:
    """Map-style dataset indexed by key; runs in the workers."""

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
        except (ValueError, OSError, MemoryError) as error:
            # Returned, not raised: torch would wrap an exception of a worker in the worker's traceback.
            return {_FAULT: sample_fault(error)}


def _collated(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The samples stacked by key, or the first sample that failed to load."""
    faults = [sample for sample in samples if _FAULT in sample]
    return faults[0] if faults else cast(dict[str, Any], default_collate(samples))


def _checked(batch: dict[str, Any]) -> dict[str, Tensor]:
    if _FAULT in batch:
        raise DataError(batch[_FAULT])
    return batch
