"""torch's `fully_shard` (FSDP2) behind the engine's interface.

Source: Zhao et al. 2023, arXiv:2304.11277; in its form of one shard per parameter, Liang et al. 2024,
arXiv:2410.06511. Only this file imports torch's sharding, and only `plugin: fsdp2` imports this file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.model_copies import copy_with
from speedit_plugins.trainer.parallel.group_state import group_values
from speedit_plugins.trainer.parallel.master_weights import Master, Slice
from speedit_plugins.trainer.parallel.optimizers import build_optimizer
from speedit_plugins.trainer.parallel.replica import (
    AUTOCAST,
    GROWTH_INTERVAL_STEPS,
    INITIAL_LOSS_SCALE,
    StepResult,
    set_lr,
)
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.parallel.sharded import Sharded, check_one_point
from speedit_plugins.trainer.parallel.units import units
from speedit_plugins.trainer.shards import whole


@dataclass(frozen=True, eq=False)
class Shard:
    """A parameter of the sharded model, and this rank's rows of it as a plain tensor that is stepped.

    Both are views of one memory.
    """

    parameter: DTensor
    own: nn.Parameter


class FullyShardedEngine(Sharded):
    """`plugin: fsdp2`: weights, gradients, master weights and moments are sharded by rows, block by block.

    A block's whole weights are there while it computes. With `sharding.replicate` there are that many groups
    of ranks. Each holds a whole sharded model, and gradients are averaged over the groups.

    Under bf16 and fp16 the weights are gathered and computed with in that precision, and gradients are summed
    in float32. The model is not in autocast.

    Args:
        model: on the runtime's device, the same on all ranks.

    Raises:
        ValueError: the ranks cannot be grouped so, or the model or the optimizer cannot be sharded by rows.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> None:
        self._runtime = runtime
        mesh = _mesh(config, runtime)
        self.template = without_weights(model)
        self.module = self.model = model
        self.optimizer: torch.optim.Optimizer = build_optimizer(model, config)
        check_one_point(self.optimizer, config)
        name_of = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        _fully_shard(model, config, mesh)
        sharded = dict(model.named_parameters())
        self._shards = {name: _shard(sharded[name]) for name in name_of.values()}
        for group in self.optimizer.param_groups:
            group["params"] = [self._shards[name_of[id(p)]].own for p in group["params"]]
        self._built_groups = group_values(self.optimizer)
        self.masters = [_master(name, shard) for name, shard in self._shards.items()]
        self._max_norm = config.optimizer.max_grad_norm
        self._scale = LossScale() if config.precision == "fp16" else None
        # A 1-D mesh is of shards alone.
        self._is_first_copy = mesh.ndim == 1 or mesh.get_local_rank("replicate") == 0

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar, averaged over the ranks."""
        (loss if self._scale is None else loss * self._scale.value).backward()

    @torch.no_grad()
    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """Makes one optimizer step with the gradients so far, see `Replica.step`."""
        set_lr(self.optimizer, lr)
        gradients = self._gradients()
        norm = self._total_norm(gradients)
        if self._scale is not None:
            torch._foreach_div_(gradients, self._scale.value)
            norm = norm / self._scale.value
            self._scale.update(is_finite=bool(norm.isfinite()))
        is_skipped = not (is_healthy and bool(norm.isfinite()))
        if not is_skipped:
            own = [shard.own for shard in self._shards.values()]
            if self._max_norm:
                nn.utils.clip_grads_with_norm_(own, self._max_norm, norm.to(own[0].device))
            self.optimizer.step()
        for shard in self._shards.values():
            shard.parameter.grad = shard.own.grad = None
        return StepResult(float(norm), is_skipped)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies whole parameters and buffers into the model, by name."""
        own = self.module.state_dict()
        for name, value in weights.items():
            held = own[name]
            if isinstance(held, DTensor):
                rows = held.to_local()
                start = _first_row(held)
                rows.copy_(value[start : start + len(rows)])
            else:
                held.copy_(value)

    def moments(self, runtime: Runtime) -> dict[str, Slice]:
        """This rank's part of the optimizer's moments, by name. Other copies of the model give nothing."""
        found = super().moments(runtime)
        return found if self._is_first_copy else {}

    def untrained(self) -> dict[str, Tensor]:
        """Buffers and whole frozen parameters. Collective."""
        found = self.module.state_dict()
        return {name: whole(value) for name, value in found.items() if name not in self._shards}

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale of fp16 and the steps since it changed; empty in other precisions."""
        scale = self._scale
        return {} if scale is None else {"scale": scale.value, "growth_step": scale.growth_step}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Restores `scaler_state`. An empty state, from another precision, leaves the initial scale."""
        if self._scale is not None and state:
            self._scale.value, self._scale.growth_step = state["scale"], state["growth_step"]

    def _gradients(self) -> list[Tensor]:
        """This rank's rows of each gradient, as the optimizer sees them too."""
        for shard in self._shards.values():
            gradient = cast(DTensor | None, shard.parameter.grad)
            # As under ddp, where a block that was not called gets a gradient of zero.
            shard.own.grad = torch.zeros_like(shard.own) if gradient is None else gradient.to_local()
        return [cast(Tensor, shard.own.grad) for shard in self._shards.values()]

    def _total_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The norm of all gradients, a float64 scalar on the CPU that is the same on all ranks to the bit."""
        squared = nn.utils.get_total_norm(gradients).double().square().cpu()
        if not self._is_first_copy:
            # The groups hold the same gradients.
            squared.zero_()
        self._runtime.sum(squared)
        return squared.sqrt()


class LossScale:
    """The loss scale of fp16, by the rule of `torch.amp.GradScaler`, which sees one rank's gradients only.

    It is halved when a gradient overflows, and doubled after GROWTH_INTERVAL_STEPS steps without one.
    """

    def __init__(self) -> None:
        self.value, self.growth_step = INITIAL_LOSS_SCALE, 0

    def update(self, *, is_finite: bool) -> None:
        """Counts a step whose gradients are finite on all ranks, or not."""
        self.growth_step = self.growth_step + 1 if is_finite else 0
        if not is_finite:
            self.value /= 2
        elif self.growth_step == GROWTH_INTERVAL_STEPS:
            self.value, self.growth_step = 2 * self.value, 0


def without_weights(model: nn.Module) -> nn.Module:
    """A copy for `functional_call` with other weights. It shares the model's buffers.

    Its parameters are on the model's device. All elements of one are a single zero, so they take no memory.
    """
    return copy_with(
        model,
        parameter=lambda own: own.detach().new_zeros(()).expand(own.shape),
        buffer=lambda own: own,
    )


def _mesh(config: ExperimentConfig, runtime: Runtime) -> DeviceMesh:
    """The ranks by copy of the model and by shard, or by shard alone if there is one copy."""
    copies, count = config.sharding.replicate, runtime.world_size
    if count % copies:
        raise ValueError(
            f"sharding.replicate: wanted a divisor of the number of processes, {count}, got {copies}"
        )
    kind = runtime.device.type
    if kind == "cpu" and config.sharding.cpu_offload:
        raise ValueError("sharding.cpu_offload: has no effect on the device cpu; wanted false")
    if copies == 1:
        return init_device_mesh(kind, (count,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (copies, count // copies), mesh_dim_names=("replicate", "shard"))


def _fully_shard(model: nn.Module, config: ExperimentConfig, mesh: DeviceMesh) -> None:
    """Shards the model in place, and compiles its blocks if the config says so."""
    for name, parameter in model.named_parameters():
        if not parameter.ndim:
            raise ValueError(
                f"plugin: fsdp2 shards parameters by rows, and {name} is a single number; wanted plugin ddp,"
                " zero1 or zero2"
            )
    dtype = AUTOCAST[config.precision]
    options: dict[str, Any] = {
        "mesh": mesh,
        # Inputs are cast once, below: torch's cast would round the timesteps too.
        "mp_policy": MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if config.sharding.cpu_offload else OffloadPolicy(),
    }
    for unit in units(model):
        if config.compile:
            # Only `forward` is compiled: the hooks that gather and free the weights are not.
            unit.forward = torch.compile(unit.forward)
        fully_shard(unit, **options)
    fully_shard(model, **options)
    if dtype != torch.float32:

        def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
            return _cast(args, dtype), _cast(kwargs, dtype)

        model.register_forward_pre_hook(cast_inputs, with_kwargs=True)


def _cast(given: Any, dtype: torch.dtype) -> Any:
    """The inputs with floating-point tensors in this type. 1-D ones, such as times, stay as they are."""
    if isinstance(given, Tensor):
        return given.to(dtype) if given.is_floating_point() and given.ndim > 1 else given
    if isinstance(given, Mapping):
        return {name: _cast(value, dtype) for name, value in given.items()}
    return tuple(_cast(value, dtype) for value in given) if isinstance(given, tuple) else given


def _shard(parameter: nn.Parameter) -> Shard:
    sharded = cast(DTensor, parameter)
    return Shard(sharded, nn.Parameter(sharded.to_local().detach()))


def _master(name: str, shard: Shard) -> Master:
    shape, own = tuple(shard.parameter.shape), shard.own
    start = _first_row(shard.parameter) * math.prod(shape[1:])
    return Master(name, shape, start, own.detach().view(-1), own, tuple(own.shape))


def _first_row(parameter: DTensor) -> int:
    """Index of this rank's first row. A shard has ceil(rows / shards) rows; the last may have fewer."""
    mesh = parameter.device_mesh
    count, rank = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    return min(len(parameter), rank * math.ceil(len(parameter) / count))
