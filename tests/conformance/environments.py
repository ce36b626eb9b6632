"""Circumstances of a training run in which the plugin has to work: point 8 of the contract."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn


@contextmanager
def process_group() -> Iterator[None]:
    """A gloo group of this process alone, unless there is a group already.

    The caller keeps no DDP model of it. A model that outlives its group frees the group while it holds
    Python's lock. Gloo's threads may need that lock, so this can hang.
    """
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New tensors have this dtype. Some hosts build a bfloat16 model in this way."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def wrapped_models(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """The model in torch.compile and in DistributedDataParallel; all have the same parameters.

    The caller keeps none of them, see `process_group`.
    """
    with process_group():
        # Without this, a model that was compiled for many shapes would run uncompiled from here on.
        torch.compiler.reset()
        # Dynamo traces. Its "eager" backend calls the same kernels, so results are the same to the bit.
        compiled = torch.compile(model, backend="eager")
        models = {"compiled": compiled, "DDP": nn.parallel.DistributedDataParallel(model)}
        del compiled
        try:
            yield models
        finally:
            models.clear()
