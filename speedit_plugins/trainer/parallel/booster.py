"""ColossalAI behind the engine's interface: DDP, ZeRO 1 and 2, Gemini.

Only this file and colossal_setup.py import ColossalAI. Checkpoints are this project's own and do not need it.
Tested with 0.5.0. Its ZeRO also runs on CPUs, see `colossal_setup`.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.colossal_setup import any_device_allowed
from speedit_plugins.trainer.parallel.group_state import group_values
from speedit_plugins.trainer.parallel.master_weights import STEP, Master
from speedit_plugins.trainer.parallel.optimizers import build_optimizer
from speedit_plugins.trainer.parallel.replica import (
    GROWTH_INTERVAL_STEPS,
    INITIAL_LOSS_SCALE,
    Replica,
    StepResult,
    set_lr,
)
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.parallel.sharded import Sharded, check_one_point


class BoostedReplica(Replica):
    """`plugin: ddp` through ColossalAI's TorchDDPPlugin."""

    def _wrapped(self, model: nn.Module, runtime: Runtime) -> nn.Module:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin

        # ColossalAI's mixed precision has no bf16, so autocast and the loss scale are those of `Replica`.
        self._booster = Booster(plugin=TorchDDPPlugin(gradient_as_bucket_view=True))
        boosted, self._boosted_optimizer, *_ = self._booster.boost(model, self.optimizer)
        return cast(nn.Module, boosted)

    def backward(self, loss: Tensor) -> None:
        self._booster.backward(self._scaler.scale(loss), self._boosted_optimizer)

    def _no_sync(self) -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], self._booster.no_sync(self.model, self._boosted_optimizer))


class ZeroEngine(Sharded):
    """`plugin: zero1 | zero2`: master weights and moments are sharded; with zero2 gradients too.

    Under bf16 and fp16 ColossalAI casts the model itself to that precision.
    Source: Rajbhandari et al. 2020, arXiv:1910.02054.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> None:
        self.module = self.template = model
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        weights = {name: p.detach().clone() for name, p in named.items()}
        # Copies, since ColossalAI casts the model: frozen tensors are saved as they were.
        self._untrained = {k: v.detach().clone() for k, v in model.state_dict().items() if k not in named}
        self._max_norm = config.optimizer.max_grad_norm
        self._step_scale, self._is_held = 1.0, False
        self._boost(named, config, runtime)
        self._built_groups = group_values(self.optimizer)
        self.masters = self._masters(named)
        # ColossalAI made the master weights from the cast model. Take the weights as initialised instead.
        self.load_weights(weights)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar, averaged over the ranks."""
        self._booster.backward(loss, self._sharded)

    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """One optimizer step with the gradients so far; see `Replica.step`."""
        grad_norm = math.inf
        set_lr(self.optimizer, lr)
        if is_healthy:
            self._step_scale = self._scale()
            # Stays None if fp16 overflows, because the step then ends before it computes a norm.
            self._sharded._current_grad_norm = None
            self._sharded.step()
            norm = self._sharded._current_grad_norm
            grad_norm = math.inf if norm is None else float(norm) / self._step_scale
        self._sharded.zero_grad()
        return StepResult(grad_norm, is_skipped=not math.isfinite(grad_norm))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies whole parameters into model and master weights, and frozen tensors into what is saved."""
        own = self.module.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)
            if name in self._untrained:
                self._untrained[name].copy_(value)
        self._load_masters(weights)

    def untrained(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters, in the precision in which they were built."""
        return self._untrained

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale of fp16 and the steps since it changed; empty in other precisions."""
        scaler = self._scaler()
        return {} if scaler is None else {"scale": float(scaler.scale), "growth_step": scaler._growth_step}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Restores `scaler_state`. An empty state, from another precision, leaves the initial scale."""
        scaler = self._scaler()
        if scaler is not None and state:
            scaler._scale.fill_(state["scale"])
            scaler._growth_step = state["growth_step"]

    def _boost(self, named: Mapping[str, nn.Parameter], config: ExperimentConfig, runtime: Runtime) -> None:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import LowLevelZeroPlugin

        self.optimizer: torch.optim.Optimizer = build_optimizer(self.module, config)
        check_one_point(self.optimizer, config)
        plugin = LowLevelZeroPlugin(
            stage={"zero1": 1, "zero2": 2}[config.plugin],
            precision=config.precision,
            max_norm=self._max_norm,
            initial_scale=INITIAL_LOSS_SCALE,
            growth_interval=GROWTH_INTERVAL_STEPS,
            hysteresis=1,
            overlap_communication=runtime.device.type == "cuda",
        )
        self._booster = Booster(plugin=plugin)
        with any_device_allowed():
            self.model, self._sharded, *_ = self._booster.boost(self.module, self.optimizer)
        self._keep_times()
        self._guard_masters()
        self._divide_by_the_scale_of_the_step(self._sharded.mixed_precision_mixin)

    def _keep_times(self) -> None:
        """Keeps timesteps in float32. ColossalAI would cast them: a time of 501.3 is 500 in bfloat16."""
        cast_input = self.model.convert_fn
        if cast_input is not None:
            self.model.convert_fn = lambda item: item if _is_vector(item) else cast_input(item)

    def _load_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Copies this rank's slices of whole parameters."""
        for master in self.masters:
            if master.name in weights:
                flat = weights[master.name].reshape(-1)
                master.values.copy_(flat[master.start : master.start + len(master.values)])

    def _guard_masters(self) -> None:
        """Makes the inner optimizer leave the master weights alone if the step is to be skipped.

        ColossalAI always steps, so one rank's NaN would reach every weight.
        """
        step = self.optimizer.step

        def guarded(*args: Any, **options: Any) -> Any:
            is_finite = math.isfinite(self._sharded._current_grad_norm)
            return None if self._is_held or not is_finite else step(*args, **options)

        self.optimizer.step = guarded  # type: ignore[method-assign]  # the object is ours, its class is torch's

    def _divide_by_the_scale_of_the_step(self, mixin: Any) -> None:
        """Divides gradients by the scale of this step. ColossalAI takes the next, perhaps doubled."""
        if self._scaler() is None:
            return
        divide = mixin.get_grad_div_scale

        def by_the_scale_of_the_step() -> float:
            divide()  # updates its own state
            return self._step_scale

        mixin.get_grad_div_scale = by_the_scale_of_the_step

    def _masters(self, named: Mapping[str, nn.Parameter]) -> list[Master]:
        masters = []
        for name, parameter in named.items():
            shard = self._sharded.working_to_master_param[id(parameter)]
            size, rank = parameter.numel(), self._sharded.pid_to_grad_store[id(parameter)].local_rank
            start = min(size, rank * len(shard))
            # The last shard ends with padding.
            values = shard[: min(len(shard), size - start)]
            masters.append(Master(name, tuple(parameter.shape), start, values, shard, tuple(shard.shape)))
        return masters

    def _scaler(self) -> Any:
        return getattr(self._sharded.mixed_precision_mixin, "grad_scaler", None)

    def _scale(self) -> float:
        """What the gradients are multiplied by."""
        scaler = self._scaler()
        return 1.0 if scaler is None else float(scaler.scale)


class GeminiEngine(ZeroEngine):
    """`plugin: gemini`: weights, gradients, master weights and moments are in sharded chunks. CUDA only.

    Source: Fang et al. 2022, arXiv:2108.05818.
    """

    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """One optimizer step; see `Replica.step`.

        Gradients may use the memory of the weights. So a skipped step also runs to its end, where the weights
        are copied back from the master weights.
        """
        set_lr(self.optimizer, lr)
        self._step_scale = self._scale()
        self._sharded._current_grad_norm = None
        self._is_held = not is_healthy
        self._sharded.step()
        norm = self._sharded._current_grad_norm
        grad_norm = math.inf if norm is None or not is_healthy else float(norm) / self._step_scale
        self._sharded.zero_grad()
        # ColossalAI leaves this set if it ends an overflowing step early.
        self._sharded.module.chunk_manager.accumulating_grads = False
        return StepResult(grad_norm, is_skipped=not math.isfinite(grad_norm))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies whole parameters into chunks and master weights, and frozen tensors into what is saved."""
        self.model.load_state_dict(dict(weights), strict=False)
        for name in weights.keys() & self._untrained.keys():
            self._untrained[name].copy_(weights[name])
        # The chunks rounded the weights to the model's precision; the master weights must not be rounded.
        self._load_masters(weights)

    def load_moments(self, whole: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Sets the optimizer's state. HybridAdam counts its steps in plain ints."""
        super().load_moments(whole, state)
        for own in self.optimizer.state.values():
            own[STEP] = int(own[STEP])

    def _boost(self, named: Mapping[str, nn.Parameter], config: ExperimentConfig, runtime: Runtime) -> None:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import GeminiPlugin
        from colossalai.nn.optimizer import HybridAdam

        options = config.optimizer
        # Gemini passes its Adam the loss scale. Torch's AdamW does not take one.
        self.optimizer = HybridAdam(
            list(named.values()),
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            **options.parameters,
        )
        plugin = GeminiPlugin(
            precision=config.precision,
            # ColossalAI computes a norm only if it clips. The norm decides whether a step is skipped.
            max_norm=self._max_norm or math.inf,
            initial_scale=INITIAL_LOSS_SCALE,
            growth_interval=GROWTH_INTERVAL_STEPS,
            hysteresis=1,
            enable_gradient_accumulation=options.grad_accumulation > 1,
        )
        self._booster = Booster(plugin=plugin)
        self.model, self._sharded, *_ = self._booster.boost(self.module, self.optimizer)
        self.model.register_forward_hook(as_plain_tensor)
        self._guard_masters()
        self._divide_by_the_scale_of_the_step(self._sharded.mix_precision_mixin)

    def _masters(self, named: Mapping[str, nn.Parameter]) -> list[Master]:
        name_of = {id(parameter): name for name, parameter in named.items()}
        masters = []
        for number, parameter in self._sharded.id_to_real_params.items():
            key = self._sharded.id_to_fake_params.get(number)
            start, values = 0, torch.empty(0, device=parameter.device)
            if key is not None:
                offset, start, size = self._sharded.get_offsets(number)
                payload = self._sharded.param_to_chunk16[key].paired_chunk.payload
                values = payload[offset : offset + size]
            name, shape = name_of[id(parameter)], tuple(parameter.shape)
            masters.append(Master(name, shape, start, values, values if key is None else key, (len(values),)))
        return masters

    def _scaler(self) -> Any:
        return getattr(self._sharded.mix_precision_mixin, "grad_scaler", None)


def as_plain_tensor(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """A forward hook: the output as a plain tensor.

    Gemini's weights and everything computed from them are ColoTensors. Their `a += b` adds to a copy of a.
    """
    return output.as_subclass(Tensor)


def _is_vector(item: Any) -> bool:
    """Whether the input is a tensor with one value per sample."""
    return isinstance(item, Tensor) and item.ndim == 1
