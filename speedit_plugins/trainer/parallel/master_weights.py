"""The float32 master weights of the trained parameters, in slices that the ranks own.

EMA and checkpoints see slices only, so they depend neither on the plugin nor on the number of ranks. A
replicated parameter is cut into equal slices, one per rank. A sharded parameter's slice is the rank's shard.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.parallel.runtime import Runtime

STEP = "step"


@dataclass(frozen=True, eq=False)
class Master:
    """The part of one parameter that this rank holds, in float32.

    Args:
        name: the parameter's name in the model.
        shape: shape of the whole parameter.
        start: where `values` begin in the flattened parameter.
        values: float32, 1-D; a view, so that it follows the optimizer.
        key: the tensor that is the key of the optimizer's state.
        state_shape: shape of the moments, perhaps with padding at the end.
        is_replicated: whether every rank holds the whole parameter.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: Tensor
    key: Tensor
    state_shape: tuple[int, ...]
    is_replicated: bool = False


@dataclass(frozen=True, eq=False)
class Slice:
    """The part of a flattened tensor that this rank owns: 1-D `values`, the first at index `start`."""

    start: int
    values: Tensor


def owned(masters: Sequence[Master], runtime: Runtime) -> dict[str, Slice]:
    """This rank's slice of each parameter, as a view. The ranks' slices together are the whole parameter."""
    return {master.name: _own(master, master.values, runtime) for master in masters}


def gather(
    slices: Mapping[str, Slice], shapes: Mapping[str, Sequence[int]], runtime: Runtime
) -> dict[str, Tensor]:
    """Whole tensors by name on rank 0 (on the CPU, if ranks are several), nothing elsewhere. Collective."""
    if runtime.world_size == 1:
        return {name: part.values.view(tuple(shapes[name])) for name, part in slices.items()}
    places = runtime.gather_objects({name: (part.start, len(part.values)) for name, part in slices.items()})
    whole = {}
    for name, part in slices.items():
        longest = max(place[name][1] for place in places)
        padded = torch.nn.functional.pad(part.values, (0, longest - len(part.values)))
        gathered = runtime.gather(padded)
        if gathered:
            flat = torch.empty(math.prod(shapes[name]))
            for place, values in zip(places, gathered, strict=True):
                start, length = place[name]
                flat[start : start + length] = values[:length].cpu()
            whole[name] = flat.view(tuple(shapes[name]))
    return whole


def optimizer_slices(
    optimizer: torch.optim.Optimizer, masters: Sequence[Master], runtime: Runtime
) -> dict[str, Slice]:
    """This rank's slices of the moments, as "exp_avg/<parameter>". The count "step/<parameter>" is whole."""
    found = {}
    for master in masters:
        # There is no state before the first step, and none for a parameter without gradients. `get`, because
        # indexing would create an entry.
        for kind, value in optimizer.state.get(master.key, {}).items():
            name = f"{kind}/{master.name}"
            if kind == STEP:
                found[name] = Slice(0, torch.as_tensor(value, dtype=torch.float32).reshape(1))
            else:
                found[name] = _own(master, value.detach().view(-1), runtime)
    return found


def load_optimizer(
    optimizer: torch.optim.Optimizer, masters: Sequence[Master], whole: Mapping[str, Tensor]
) -> None:
    """Sets the optimizer's state from whole flat tensors by the names of `optimizer_slices`.

    Args:
        whole: read lazily, one tensor at a time.
    """
    kinds: dict[str, list[str]] = {}
    for name in whole:
        kind, _, parameter = name.partition("/")
        kinds.setdefault(parameter, []).append(kind)
    optimizer.state.clear()
    for master in masters:
        state: dict[str, Any] = {}
        for kind in kinds.get(master.name, ()):
            flat = whole[f"{kind}/{master.name}"]
            if kind == STEP:
                # Fused AdamW keeps the count on the parameter's device.
                state[kind] = flat.reshape(()).to(master.values.device)
                continue
            value = torch.zeros(math.prod(master.state_shape), device=master.values.device)
            value[: len(master.values)] = flat[master.start : master.start + len(master.values)]
            state[kind] = value.view(master.state_shape)
        if state:
            optimizer.state[master.key] = state


def _own(master: Master, held: Tensor, runtime: Runtime) -> Slice:
    """The part of `held` that this rank owns. The first value of `held` has index `master.start`."""
    size = math.prod(master.shape)
    if not master.is_replicated:
        return Slice(master.start, held[: len(master.values)])
    share = math.ceil(size / runtime.world_size)
    first, last = (min(size, place * share) for place in (runtime.rank, runtime.rank + 1))
    return Slice(first, held[first:last])
