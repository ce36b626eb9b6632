"""A model that every rank holds whole: one process, or torch's DistributedDataParallel."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from speedit_plugins.trainer.config.schema import ExperimentConfig, OptimizerConfig
from speedit_plugins.trainer.parallel.master_weights import Master, load_optimizer
from speedit_plugins.trainer.parallel.runtime import Runtime

AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of the loss scale under fp16. Source: torch.amp.GradScaler's own defaults.
INITIAL_LOSS_SCALE = 2.0**16
GROWTH_INTERVAL_STEPS = 2000


@dataclass(frozen=True)
class StepResult:
    """Of an optimizer step: gradient norm before clipping over all ranks, and whether the weights moved."""

    grad_norm: float
    is_skipped: bool


class Engine(Protocol):
    """Turns losses into steps. Every method is called by all ranks in the same order.

    `model` is what forward passes go through, `module` the bare model with its parameters' names.
    """

    model: nn.Module
    module: nn.Module
    optimizer: torch.optim.Optimizer
    masters: list[Master]

    def autocast(self) -> AbstractContextManager[Any]: ...
    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr: float, *, is_healthy: bool) -> StepResult: ...
    def load_weights(self, weights: Mapping[str, Tensor]) -> None: ...
    def load_moments(self, whole: Mapping[str, Tensor]) -> None: ...
    def untrained(self) -> dict[str, Tensor]: ...
    def scaler_state(self) -> dict[str, Any]: ...
    def load_scaler_state(self, state: Mapping[str, Any]) -> None: ...


class Replica:
    """The engine of `plugin: ddp` without ColossalAI, and of a lone process.

    Under bf16 and fp16 the forward pass runs in autocast; the parameters are their own float32 masters. fp16
    scales the loss, and a step that overflows is skipped. Source: Micikevicius et al. 2018, arXiv:1710.03740.

    Args:
        model: on the runtime's device.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> None:
        self.module = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer = build_optimizer(self._parameters, config.optimizer)
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
        """The precision that the forward pass runs in."""
        dtype = AUTOCAST[self._precision]
        return torch.autocast(self._device_type, dtype, enabled=self._precision != "fp32")

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a batch: gradients are averaged over the ranks in the last one."""
        if is_last or self.model is self.module:
            return nullcontext()
        return self._no_sync()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar, to what the step has so far."""
        self._scaler.scale(loss).backward()

    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """One optimizer step with the gradients so far, and forgets them.

        Args:
            is_healthy: False skips it, as a gradient norm does that is not finite. The same on all ranks.
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
        """Copies whole parameters and buffers of the given names into the model."""
        own = self.module.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)

    def load_moments(self, whole: Mapping[str, Tensor]) -> None:
        """Sets the optimizer's state, see `masters.load_optimizer`."""
        load_optimizer(self.optimizer, self.masters, whole)

    def untrained(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters of the state dict, which no optimizer moves."""
        trained = {master.name for master in self.masters}
        return {name: value for name, value in self.module.state_dict().items() if name not in trained}

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale of fp16 and the steps since it changed, alike in all engines; empty otherwise."""
        state = self._scaler.state_dict()
        return {"scale": state["scale"], "growth_step": state["_growth_tracker"]} if state else {}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Restores `scaler_state`; an empty one, of another precision, leaves the scale as it starts."""
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


def build_optimizer(parameters: list[nn.Parameter], options: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trained parameters, in torch's fused form."""
    return torch.optim.AdamW(
        parameters, lr=options.lr, betas=options.betas, weight_decay=options.weight_decay, fused=True
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
