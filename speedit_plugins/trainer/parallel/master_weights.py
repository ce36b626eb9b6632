"""The float32 masters of the trained parameters, cut into the slices that the ranks own.

EMA and checkpoints work on slices alone, so that they neither know the plugin nor the number of ranks. A
replicated parameter is cut into equal slices, one per rank; a sharded one is owned where it lies.
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
    """What this rank holds of one parameter.

    Args:
        name: of the parameter in the model.
        shape: of the whole parameter.
        start: where `values` begin in the flattened parameter.
        values: float32, 1-D; a view, so that it follows the optimizer.
        key: the tensor under which the optimizer keeps its state.
        state_shape: of its moments; may be padded at the end.
        is_replicated: every rank holds the whole of it.
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
    """What this rank owns of a flattened tensor: `values`, 1-D, from `start` on."""

    start: int
    values: Tensor


def owned(masters: Sequence[Master], runtime: Runtime) -> dict[str, Slice]:
    """This rank's slice of each master, a view; all slices of a parameter together are the whole of it."""
    return {master.name: _own(master, master.values, runtime) for master in masters}


def gather(
    slices: Mapping[str, Slice], shapes: Mapping[str, Sequence[int]], runtime: Runtime
) -> dict[str, Tensor]:
    """The whole tensors by name on rank 0, empty elsewhere; on the CPU with several ranks. Collective."""
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
    """This rank's slice of each moment, "exp_avg/<parameter>"; the count "step/<parameter>" is whole."""
    found = {}
    for master in masters:
        # Empty before the first step, and for a parameter that never had a gradient; asked by `get`, since
        # the optimizer's state makes an entry for whoever indexes it.
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
        whole: lazily read, one at a time.
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
                # AdamW's fused form counts on the parameter's device.
                state[kind] = flat.reshape(()).to(master.values.device)
                continue
            value = torch.zeros(math.prod(master.state_shape), device=master.values.device)
            value[: len(master.values)] = flat[master.start : master.start + len(master.values)]
            state[kind] = value.view(master.state_shape)
        if state:
            optimizer.state[master.key] = state


def _own(master: Master, held: Tensor, runtime: Runtime) -> Slice:
    """The owned part of `held`, which begins at `master.start`."""
    size = math.prod(master.shape)
    if not master.is_replicated:
        return Slice(master.start, held[: len(master.values)])
    share = math.ceil(size / runtime.world_size)
    first, last = (min(size, place * share) for place in (runtime.rank, runtime.rank + 1))
    return Slice(first, held[first:last])
