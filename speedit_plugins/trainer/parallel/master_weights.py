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
# The weights at which a schedule-free optimizer takes gradients. They are saved beside its state.
TRAINING_POINT = "training_point"


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
    """This rank's slices of the state's tensors, as "exp_avg/<parameter>". "step/<parameter>" is whole.

    What else there is in the state is in `optimizer_layout`.

    Raises:
        ValueError: a sharded parameter has a state that is not of its elements, so it cannot be put together.
    """
    found = {}
    seen: set[int] = set()
    for master in masters:
        # There is no state before the first step, and none for a parameter without gradients. `get`, because
        # indexing would create an entry.
        for kind, value in optimizer.state.get(master.key, {}).items():
            name = f"{kind}/{master.name}"
            if kind == STEP and _is_usual(master, kind, value):
                found[name] = Slice(0, torch.as_tensor(value, dtype=torch.float32).reshape(1))
            elif isinstance(value, Tensor):
                _check_slice(master, name, value)
                flat = value.detach().reshape(-1)
                # bitsandbytes shares its tables among the parameters. A file has no shared tensors.
                found[name] = _own(master, flat.clone() if flat.data_ptr() in seen else flat, runtime)
                seen.add(flat.data_ptr())
    return found


def optimizer_layout(optimizer: torch.optim.Optimizer, masters: Sequence[Master]) -> dict[str, Any]:
    """What the slices of the state do not say, as plain values: unusual shapes, and all that is no tensor.

    Usual are float32 tensors with the shape of the parameter, on its device, and a count `step` in float32.

    Raises:
        ValueError: a value is neither a tensor nor plain.
    """
    shapes, on_cpu, values = {}, [], {}
    for master in masters:
        for kind, value in optimizer.state.get(master.key, {}).items():
            name = f"{kind}/{master.name}"
            if _is_usual(master, kind, value):
                continue
            if not isinstance(value, Tensor):
                values[name] = plain_value(f"the optimizer's state {name}", value)
                continue
            shapes[name] = list(value.shape)
            if value.device.type == "cpu" and master.values.device.type != "cpu":
                on_cpu.append(name)
    return {"shapes": shapes, "on_cpu": on_cpu, "values": values}


def plain_value(what: str, value: Any) -> Any:
    """The value, if a checkpoint can hold it: a number, text, None, a tensor, or lists and dicts of these.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, dict):
        return {key: plain_value(what, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_value(what, item) for item in value)
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    raise ValueError(f"{what} cannot be saved: wanted tensors, numbers or text, got {type(value).__name__}")


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    masters: Sequence[Master],
    whole: Mapping[str, Tensor],
    layout: Mapping[str, Any] | None = None,
) -> None:
    """Sets the optimizer's state from whole flat tensors by the names of `optimizer_slices`.

    Args:
        whole: read lazily, one tensor at a time.
        layout: see `optimizer_layout`; None if all is usual, as in checkpoints of earlier versions.
    """
    layout = layout or {"shapes": {}, "on_cpu": (), "values": {}}
    kinds: dict[str, list[str]] = {}
    for name in (*whole, *layout["values"]):
        kind, _, parameter = name.partition("/")
        if kind != TRAINING_POINT:
            kinds.setdefault(parameter, []).append(kind)
    optimizer.state.clear()
    for master in masters:
        state = {kind: _restored(master, kind, whole, layout) for kind in kinds.get(master.name, ())}
        if state:
            optimizer.state[master.key] = state


def _restored(master: Master, kind: str, whole: Mapping[str, Tensor], layout: Mapping[str, Any]) -> Any:
    """A value of the state of one parameter, as it was."""
    name, device = f"{kind}/{master.name}", master.values.device
    if name in layout["values"]:
        return layout["values"][name]
    if name in layout["shapes"]:
        place = "cpu" if name in layout["on_cpu"] else device
        return whole[name].reshape(layout["shapes"][name]).to(place)
    if kind == STEP:
        # Fused AdamW keeps the count on the parameter's device.
        return whole[name].reshape(()).to(device)
    return _part_of(master, whole[name])


def _check_slice(master: Master, name: str, value: Tensor) -> None:
    if not master.is_replicated and value.numel() != math.prod(master.state_shape):
        raise ValueError(
            f"the optimizer's state {name} of shape {tuple(value.shape)} is not one of each element; wanted"
            " plugin ddp, or another optimizer"
        )


def _is_usual(master: Master, kind: str, value: Any) -> bool:
    # Sharded optimizers act on each element alone, so they have nothing else.
    if not master.is_replicated:
        return kind == STEP or isinstance(value, Tensor)
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    shape = () if kind == STEP else master.state_shape
    return tuple(value.shape) == shape and value.device == master.values.device


def _part_of(master: Master, flat: Tensor) -> Tensor:
    """This rank's part of a whole flat tensor, padded to the shape of its state."""
    value = torch.zeros(math.prod(master.state_shape), device=master.values.device)
    value[: len(master.values)] = flat[master.start : master.start + len(master.values)]
    return value.view(master.state_shape)


def _own(master: Master, held: Tensor, runtime: Runtime) -> Slice:
    """The part of `held` that this rank owns. The first value of `held` has index `master.start`.

    Every rank holds a replicated parameter, and all of its state, even that of another size.
    """
    if not master.is_replicated:
        return Slice(master.start, held[: len(master.values)])
    size = len(held)
    share = math.ceil(size / runtime.world_size)
    first, last = (min(size, place * share) for place in (runtime.rank, runtime.rank + 1))
    return Slice(first, held[first:last])
