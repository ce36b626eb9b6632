"""The processes of a run: which one this is, and how they exchange values.

This file uses torch.distributed only; ColossalAI is in booster.py and colossal_setup.py.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.peers import Peers, meet
from speedit_plugins.trainer.parallel.same_config import difference, stated


@dataclass(frozen=True, eq=False)
class Runtime:
    """One process among `world_size`. The default is a single process without a process group.

    Every method but `close` is a collective: all ranks call it, in the same order. With one process it
    returns at once.

    Args:
        rank: number of this process, in [0, world_size).
        device: device of its model and batches.
        group: whose collectives it uses; None is the default one.
        sequence_size: number of consecutive ranks that share samples.
        sequence_group: the process group of these ranks; None if each has samples of its own.
        peers: who the others are, if there are others; tells which of them is gone.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    group: "dist.ProcessGroup | None" = None
    sequence_size: int = 1
    sequence_group: "dist.ProcessGroup | None" = None
    peers: Peers | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes files, logs and samples for all."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Number of this process's part of each batch, in [0, data_size)."""
        return self.rank // self.sequence_size

    @property
    def data_size(self) -> int:
        """Number of parts that a batch is split into."""
        return self.world_size // self.sequence_size

    @property
    def counts_samples(self) -> bool:
        """Whether this process counts the samples of its group, so that none is counted twice."""
        return self.rank % self.sequence_size == 0

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.maximum([0.0])

    def maximum(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        if self.world_size == 1:
            return list(values)
        # On the CPU, through gloo, so that nothing waits for the device.
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor.tolist()

    def sum(self, tensor: Tensor) -> None:
        """Replaces the values of `tensor` by their sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(tensor, group=self.group)

    def broadcast(self, tensor: Tensor) -> None:
        """Replaces the values of `tensor` on other ranks by those of rank 0. All have one shape."""
        if self.world_size > 1:
            dist.broadcast(tensor, src=0, group=self.group)

    def gather_objects(self, item: Any) -> list[Any]:
        """The picklable `item` of every rank, in rank order."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks on rank 0, an empty list on others. All have one shape."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)] if self.is_main else None
        dist.gather(tensor, parts, group=self.group)
        return parts or []

    def raise_together(self, fault: Exception | None) -> None:
        """Returns if no rank has a fault. Otherwise all ranks raise, and none waits for one that has ended.

        Raises:
            Exception: `fault`, on the ranks that have one.
            ValueError: the first rank's fault, on the other ranks.
        """
        said = self.gather_objects(None if fault is None else str(fault) or type(fault).__name__)
        if fault is not None:
            raise fault
        for rank, text in enumerate(said):
            if text is not None:
                raise ValueError(f"{text} (on rank {rank})")

    def apart(self, timeout_seconds: float) -> "Runtime":
        """The same ranks on the CPU, with collectives of their own, for a second thread.

        Args:
            timeout_seconds: how long a rank waits for another one.
        """
        if self.world_size == 1:
            return Runtime()
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
        return Runtime(self.rank, self.world_size, group=group)

    def close(self) -> None:
        """Leaves the process group."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        if self.peers is not None:
            self.peers.close()


def launch(config: ExperimentConfig) -> Runtime:
    """Joins the processes that torchrun or `colossalai run` started, or runs as a single process.

    Raises:
        ValueError: a launcher's environment variables are incomplete, there are more processes than CUDA
            devices, they cannot share samples or the batch as the config says, or they have different configs
            or versions of this package; then all of them raise it.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    num_parts(config, world_size)
    device = build_device(config)
    if device.type == "cuda":
        device = _own_cuda_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world_size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise ValueError(f"WORLD_SIZE={world_size} needs {', '.join(missing)} too; torchrun sets them")
        _join(device, config.distributed_timeout_seconds)
    elif config.plugin != "ddp":
        # The sharded optimizers need a process group, even of one process.
        _join(device, config.distributed_timeout_seconds, is_alone=True)
    runtime = Runtime(rank, world_size, device)
    # The first collective, so that no process waits for one that trains something else.
    if problem := difference(runtime.gather_objects(stated(config))):
        raise ValueError(problem)
    runtime = sharing_samples(runtime, config)
    return replace(runtime, peers=meet(rank, runtime.gather_objects)) if world_size > 1 else runtime


def sharing_samples(runtime: Runtime, config: ExperimentConfig) -> Runtime:
    """The runtime with groups of `sequence_parallel` consecutive ranks; collective.

    Raises:
        ValueError: the number of processes is no multiple of it, or the batch has no equal parts.
    """
    size = config.sequence_parallel
    num_parts(config, runtime.world_size)
    if size == 1:
        return replace(runtime, sequence_size=1, sequence_group=None)
    timeout, own = timedelta(seconds=config.distributed_timeout_seconds), None
    # Every rank makes every group.
    for first in range(0, runtime.world_size, size):
        group = dist.new_group(list(range(first, first + size)), timeout=timeout)
        own = group if first <= runtime.rank < first + size else own
    return replace(runtime, sequence_size=size, sequence_group=own)


def num_parts(config: ExperimentConfig, world_size: int) -> int:
    """Number of parts that so many processes split a batch into.

    Raises:
        ValueError: they cannot share samples or the batch as the config says.
    """
    size = config.sequence_parallel
    if world_size % size:
        raise ValueError(
            f"sequence_parallel: wanted a divisor of the number of processes, {world_size}, got {size}"
        )
    parts = world_size // size
    if config.data.batch_size % parts:
        kind = "processes" if size == 1 else f"groups of {size} processes"
        raise ValueError(
            f"data.batch_size counts the samples of all processes: wanted a multiple of {parts} {kind}, got"
            f" {config.data.batch_size}"
        )
    return parts


def build_device(config: ExperimentConfig) -> torch.device:
    """The device of the run. `auto` is CUDA if there is a CUDA device.

    Raises:
        ValueError: the config asks for CUDA and there is none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda needs a CUDA device, got none; wanted auto or cpu on this machine")
    is_cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    return torch.device("cuda" if is_cuda else "cpu")


def _own_cuda_device(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {local_rank} needs a CUDA device of its own, got {torch.cuda.device_count()} devices"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def _join(device: torch.device, timeout_seconds: float, *, is_alone: bool = False) -> None:
    # Values that ranks exchange are on the CPU, also beside NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if is_alone:
        store = dist.HashStore()  # type: ignore[attr-defined]  # missing in the stubs only
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)
