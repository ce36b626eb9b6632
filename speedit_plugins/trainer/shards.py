"""Tells sharded tensors from whole ones, and gathers them.

It looks for the method that torch's `DTensor` has, so that a run without shards need not import it.
"""

from typing import Any, cast

from torch import Tensor


def is_shard(tensor: Tensor) -> bool:
    """Whether it is this rank's part of a sharded tensor, one of torch's `DTensor`."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a shard, gathered from all ranks, which must call this together; others as they are."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_shard(tensor) else tensor
