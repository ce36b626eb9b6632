"""The engine for a model that every rank holds whole: one process, or DistributedDataParallel."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.group_state import changed_values, group_values, load_group_values
from speedit_plugins.trainer.parallel.master_weights import (
    TRAINING_POINT,
    Master,
    Slice,
    load_optimizer,
    optimizer_layout,
    optimizer_slices,
    owned,
)
from speedit_plugins.trainer.parallel.optimizers import build_optimizer, has_two_points
from speedit_plugins.trainer.parallel.runtime import Runtime

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The loss scale under fp16. Source: torch.amp.GradScaler's own defaults.
INITIAL_LOSS_SCALE = 2.0**16
GROWTH_INTERVAL_STEPS = 2000


@dataclass(frozen=True)
class StepResult:
    """Result of an optimizer step: the global gradient norm before clipping, and whether it was skipped."""

    grad_norm: float
    is_skipped: bool


class Engine(Protocol):
    """Turns losses into steps. Every method is called by all ranks in the same order.

    `model` runs the forward passes. `module` is the bare model, with the parameters' own names. `template` is
    for `functional_call` with whole weights on one rank; its own may be empty.
    """

    model: nn.Module
    module: nn.Module
    template: nn.Module
    optimizer: torch.optim.Optimizer
    masters: list[Master]

    def autocast(self) -> AbstractContextManager[Any]: ...
    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr: float, *, is_healthy: bool) -> StepResult: ...
    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...
    def evaluation_point(self) -> AbstractContextManager[bool]: ...
    def moments(self, runtime: Runtime) -> dict[str, Slice]: ...
    def optimizer_state(self) -> dict[str, Any]: ...
    def load_moments(self, whole: Mapping[str, Tensor], state: Mapping[str, Any]) -> None: ...
    def untrained(self) -> dict[str, Tensor]: ...
    def scaler_state(self) -> dict[str, Any]: ...
    def load_scaler_state(self, state: Mapping[str, Any]) -> None: ...


class Replica:
    """The engine of a single process, and of `plugin: ddp` without ColossalAI.

    Under bf16 and fp16 the forward pass runs in autocast, and the parameters stay float32. fp16 scales the
    loss, and a step that overflows is skipped. Source: Micikevicius et al. 2018, arXiv:1710.03740.

    Args:
        model: on the runtime's device.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> None:
        self.module = self.template = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = build_optimizer(model, config)
        self._built_groups = group_values(self.optimizer)
        self._has_two_points = has_two_points(self.optimizer)
        if self._has_two_points:
            self.optimizer.train()  # type: ignore[attr-defined]  # schedulefree's, or one's own after its model
        self.model = self._wrapped(model, runtime)
        self.masters = [
            Master(name, tuple(p.shape), 0, p.detach().view(-1), p, tuple(p.shape), is_replicated=True)
            for name, p in model.named_parameters()
            if p.requires_grad
        ]
        self._max_norm = config.optimizer.max_grad_norm
        self._device_type, self._precision = runtime.device.type, config.precision
        self._scaler = torch.amp.GradScaler(
            runtime.device.type,
            init_scale=INITIAL_LOSS_SCALE,
            growth_interval=GROWTH_INTERVAL_STEPS,
            enabled=config.precision == "fp16",
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which the forward pass runs in the config's precision."""
        dtype = AUTOCAST[self._precision]
        return torch.autocast(self._device_type, dtype, enabled=self._precision != "fp32")

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """A context for one batch. Only the last batch of a step averages gradients over the ranks."""
        if is_last or self.model is self.module:
            return nullcontext()
        return self._no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of the scalar `loss` to the gradients of the step."""
        self._scaler.scale(loss).backward()

    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """Makes one optimizer step with the gradients so far, then clears them.

        Args:
            is_healthy: False skips the step, as does a gradient norm that is not finite. Equal on all ranks.
        """
        set_lr(self.optimizer, lr)
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        grad_norm = float(norm)
        is_skipped = not (is_healthy and bool(norm.isfinite()))
        if not is_skipped:
            if self._max_norm:
                nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, norm)
            self.optimizer.step()
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm, is_skipped)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies whole parameters and buffers into the model, by name."""
        own = self.module.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)

    @contextmanager
    def evaluation_point(self) -> Iterator[bool]:
        """Inside, the weights are those to save, average and sample with. Says whether they are others.

        A schedule-free optimizer takes gradients at another point. Afterwards the weights are there again, to
        the bit: its own way back rounds.
        """
        if not self._has_two_points:
            yield False
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self.optimizer.eval()  # type: ignore[attr-defined]  # as in __init__
        try:
            yield True
        finally:
            self.optimizer.train()  # type: ignore[attr-defined]  # as in __init__
            with torch.no_grad():
                for parameter, value in zip(self._parameters, kept, strict=True):
                    parameter.copy_(value)

    def moments(self, runtime: Runtime) -> dict[str, Slice]:
        """This rank's part of the optimizer's tensors, by name."""
        found = optimizer_slices(self.optimizer, self.masters, runtime)
        if self._has_two_points:
            # Copies, because `evaluation_point` moves the weights.
            for name, part in owned(self.masters, runtime).items():
                found[f"{TRAINING_POINT}/{name}"] = Slice(part.start, part.values.clone())
        return found

    def optimizer_state(self) -> dict[str, Any]:
        """What else the optimizer needs to go on, as plain values; the same on every rank."""
        changed = changed_values(self.optimizer, self._built_groups)
        return {"layout": optimizer_layout(self.optimizer, self.masters), "groups": changed}

    @torch.no_grad()
    def load_moments(self, whole: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restores `moments`, as whole flat tensors, and `optimizer_state`, {} in older checkpoints."""
        load_optimizer(self.optimizer, self.masters, whole, state.get("layout"))
        load_group_values(self.optimizer, state.get("groups", ()))
        for master in self.masters:
            if self._has_two_points and (name := f"{TRAINING_POINT}/{master.name}") in whole:
                master.values.copy_(whole[name])

    def untrained(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters of the state dict."""
        trained = {master.name for master in self.masters}
        return {name: value for name, value in self.module.state_dict().items() if name not in trained}

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale of fp16 and the steps since it changed; empty in other precisions."""
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "growth_step": state["_growth_tracker"]} if state else {}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Restores `scaler_state`. An empty state, from another precision, leaves the initial scale."""
        if state and self._scaler.is_enabled():
            changed = {"scale": state["scale"], "_growth_tracker": state["growth_step"]}
            self._scaler.load_state_dict({**self._scaler.state_dict(), **changed})

    def _wrapped(self, model: nn.Module, runtime: Runtime) -> nn.Module:
        if runtime.world_size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def _no_sync(self) -> AbstractContextManager[Any]:
        assert isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
