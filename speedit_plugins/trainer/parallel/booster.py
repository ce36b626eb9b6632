"""ColossalAI behind the engine's interface: its Booster with DDP, ZeRO 1 and 2, Gemini.

The only file that knows ColossalAI; checkpoints are this project's own and need nothing of it. Tested against
0.5.0, whose ZeRO runs on CPUs too once its accelerator has the few methods below.
"""

import importlib.util
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.heap import keep_freed_pages
from speedit_plugins.trainer.parallel.master_weights import STEP, Master, load_optimizer
from speedit_plugins.trainer.parallel.replica import (
    GROWTH_INTERVAL_STEPS,
    INITIAL_LOSS_SCALE,
    Engine,
    Replica,
    StepResult,
    build_optimizer,
    set_lr,
)
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say

INSTALLATION = "pip install 'speedit-plugins[colossal]' && pip install --no-deps colossalai==0.5.0"


def build_engine(model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> Engine:
    """The engine of `plugin`; a lone process of `ddp` needs no ColossalAI, and several can do without.

    Raises:
        ValueError: a sharding plugin without ColossalAI, gemini without CUDA or in a precision it lacks.
    """
    if runtime.device.type == "cpu":
        keep_freed_pages()
    if config.plugin == "ddp" and runtime.world_size == 1:
        return Replica(model, config, runtime)
    if importlib.util.find_spec("colossalai") is None:
        if config.plugin != "ddp":
            raise ValueError(f"plugin: {config.plugin} needs ColossalAI; wanted ddp, or {INSTALLATION}")
        if runtime.is_main:
            say(f"no ColossalAI: ddp is torch's own; zero1, zero2 and gemini need {INSTALLATION}")
        return Replica(model, config, runtime)
    if config.plugin == "gemini":
        _check_gemini(config, runtime)
    _import_quietly()
    _set_accelerator(runtime.device)
    engines = {"ddp": BoostedReplica, "zero1": ZeroEngine, "zero2": ZeroEngine, "gemini": GeminiEngine}
    return cast(Engine, engines[config.plugin](model, config, runtime))


class BoostedReplica(Replica):
    """`plugin: ddp` through ColossalAI's TorchDDPPlugin."""

    def _wrapped(self, model: nn.Module, runtime: Runtime) -> nn.Module:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import TorchDDPPlugin

        # Its mixed precision knows no bf16: autocast and the loss scale are those of `Replica`.
        self._booster = Booster(plugin=TorchDDPPlugin(gradient_as_bucket_view=True))
        boosted, self._boosted_optimizer, *_ = self._booster.boost(model, self.optimizer)
        return cast(nn.Module, boosted)

    def backward(self, loss: Tensor) -> None:
        self._booster.backward(self._scaler.scale(loss), self._boosted_optimizer)

    def _no_sync(self) -> AbstractContextManager[Any]:
        return cast(AbstractContextManager[Any], self._booster.no_sync(self.model, self._boosted_optimizer))


class ZeroEngine:
    """`plugin: zero1 | zero2`: masters and moments are sharded over the ranks, under zero2 gradients too.

    Under bf16 and fp16 the model itself is held in that precision, as ColossalAI does it.
    Source: Rajbhandari et al. 2020, arXiv:1910.02054.
    """

    def __init__(self, model: nn.Module, config: ExperimentConfig, runtime: Runtime) -> None:
        self.module = model
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        weights = {name: p.detach().clone() for name, p in named.items()}
        # Frozen tensors stay as they are, where the model is cast.
        self._untrained = {k: v.detach().clone() for k, v in model.state_dict().items() if k not in named}
        self._max_norm = config.optimizer.max_grad_norm
        self._step_scale, self._is_held = 1.0, False
        self._boost(named, config, runtime)
        self.masters = self._masters(named)
        # The masters were made from the cast model: they start from the weights as initialised.
        self.load_weights(weights)

    def autocast(self) -> AbstractContextManager[Any]:
        """Nothing: the model holds its precision."""
        return nullcontext()

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Nothing: each backward pass adds to the shards, which is what keeps gradients sharded."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss`, a scalar, averaged over the ranks."""
        self._booster.backward(loss, self._sharded)

    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """One optimizer step with the gradients so far; see `Replica.step`."""
        grad_norm = math.inf
        set_lr(self.optimizer, lr)
        if is_healthy:
            self._step_scale = self._scale()
            # Stays None where fp16 overflows: the step ends before a norm is taken.
            self._sharded._current_grad_norm = None
            self._sharded.step()
            norm = self._sharded._current_grad_norm
            grad_norm = math.inf if norm is None else float(norm) / self._step_scale
        self._sharded.zero_grad()
        return StepResult(grad_norm, is_skipped=not math.isfinite(grad_norm))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies whole parameters into model and masters, frozen tensors into what is saved too."""
        own = self.module.state_dict()
        for name, value in weights.items():
            own[name].copy_(value)
            if name in self._untrained:
                self._untrained[name].copy_(value)
        self._load_masters(weights)

    def load_moments(self, whole: Mapping[str, Tensor]) -> None:
        """Sets the optimizer's state, see `masters.load_optimizer`."""
        load_optimizer(self.optimizer, self.masters, whole)

    def untrained(self) -> dict[str, Tensor]:
        """Buffers and frozen parameters, in the precision they were built in."""
        return self._untrained

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale of fp16 and the steps since it changed, alike in all engines; empty otherwise."""
        scaler = self._scaler()
        return {} if scaler is None else {"scale": float(scaler.scale), "growth_step": scaler._growth_step}

    def load_scaler_state(self, state: Mapping[str, Any]) -> None:
        """Restores `scaler_state`; an empty one, of another precision, leaves the scale as it starts."""
        scaler = self._scaler()
        if scaler is not None and state:
            scaler._scale.fill_(state["scale"])
            scaler._growth_step = state["growth_step"]

    def _boost(self, named: Mapping[str, nn.Parameter], config: ExperimentConfig, runtime: Runtime) -> None:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import LowLevelZeroPlugin

        self.optimizer: torch.optim.Optimizer = build_optimizer(list(named.values()), config.optimizer)
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
        with _any_device_allowed():
            self.model, self._sharded, *_ = self._booster.boost(self.module, self.optimizer)
        self._keep_times()
        self._guard_masters()
        self._divide_by_the_scale_of_the_step(self._sharded.mixed_precision_mixin)

    def _keep_times(self) -> None:
        """ColossalAI casts all inputs to the model's precision; in bfloat16 a time of 501.3 would be 500."""
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
        """Lets the inner optimizer leave the masters alone where the step is to be skipped.

        ColossalAI steps in any case, and one rank's NaN would reach every weight.
        """
        step = self.optimizer.step

        def guarded(*args: Any, **options: Any) -> Any:
            is_finite = math.isfinite(self._sharded._current_grad_norm)
            return None if self._is_held or not is_finite else step(*args, **options)

        self.optimizer.step = guarded  # type: ignore[method-assign]  # the object is ours, its class is torch's

    def _divide_by_the_scale_of_the_step(self, mixin: Any) -> None:
        """ColossalAI lets a scale grow before it divides by it: the step would be half as long."""
        if self._scaler() is None:
            return
        divide = mixin.get_grad_div_scale

        def by_the_scale_of_the_step() -> float:
            divide()  # for the state it keeps
            return self._step_scale

        mixin.get_grad_div_scale = by_the_scale_of_the_step

    def _masters(self, named: Mapping[str, nn.Parameter]) -> list[Master]:
        masters = []
        for name, parameter in named.items():
            shard = self._sharded.working_to_master_param[id(parameter)]
            size, rank = parameter.numel(), self._sharded.pid_to_grad_store[id(parameter)].local_rank
            start = min(size, rank * len(shard))
            # The end of the last shard is padding.
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
    """`plugin: gemini`: weights, gradients, masters and moments live in sharded chunks. CUDA only.

    Source: Fang et al. 2022, arXiv:2108.05818.
    """

    def step(self, lr: float, *, is_healthy: bool) -> StepResult:
        """One optimizer step; see `Replica.step`.

        Gradients may lie where the weights were, so that a skipped step too runs to its end, which puts the
        masters back.
        """
        set_lr(self.optimizer, lr)
        self._step_scale = self._scale()
        self._sharded._current_grad_norm = None
        self._is_held = not is_healthy
        self._sharded.step()
        norm = self._sharded._current_grad_norm
        grad_norm = math.inf if norm is None or not is_healthy else float(norm) / self._step_scale
        self._sharded.zero_grad()
        # Left set where ColossalAI ends an overflowing step early.
        self._sharded.module.chunk_manager.accumulating_grads = False
        return StepResult(grad_norm, is_skipped=not math.isfinite(grad_norm))

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copies whole parameters into chunks and masters, frozen tensors into what is saved too."""
        self.model.load_state_dict(dict(weights), strict=False)
        for name in weights.keys() & self._untrained.keys():
            self._untrained[name].copy_(weights[name])
        # What the chunks took went through the model's precision.
        self._load_masters(weights)

    def load_moments(self, whole: Mapping[str, Tensor]) -> None:
        """Sets the optimizer's state; this Adam counts its steps in plain ints."""
        super().load_moments(whole)
        for state in self.optimizer.state.values():
            state[STEP] = int(state[STEP])

    def _boost(self, named: Mapping[str, nn.Parameter], config: ExperimentConfig, runtime: Runtime) -> None:
        from colossalai.booster import Booster
        from colossalai.booster.plugin import GeminiPlugin
        from colossalai.nn.optimizer import HybridAdam

        options = config.optimizer
        # Gemini hands its Adam the scale to divide gradients by, which torch's does not take.
        self.optimizer = HybridAdam(
            list(named.values()), lr=options.lr, betas=options.betas, weight_decay=options.weight_decay
        )
        plugin = GeminiPlugin(
            precision=config.precision,
            # The norm is only taken where something is clipped, and it decides whether a step is skipped.
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
    """A forward hook: the output as torch's own tensor.

    Gemini's weights, and all that is computed from them, are ColoTensors, whose `a += b` adds to a copy of a.
    """
    return output.as_subclass(Tensor)


def _is_vector(item: Any) -> bool:
    """Whether it has one value per sample."""
    return isinstance(item, Tensor) and item.ndim == 1


def _check_gemini(config: ExperimentConfig, runtime: Runtime) -> None:
    if runtime.device.type != "cuda":
        raise ValueError(
            f"plugin: gemini needs CUDA, got {runtime.device.type}: it manages chunks of GPU memory;"
            " wanted ddp, zero1 or zero2 here"
        )
    if config.precision == "fp32":
        raise ValueError("plugin: gemini trains in bf16 or fp16, got precision: fp32")
    if config.diffusion.is_flow:
        raise ValueError(
            "diffusion.type: RectifiedFlow does not go with plugin: gemini, which rounds continuous times to"
            " the model's precision; wanted ddp, zero1 or zero2"
        )
    if config.compile:
        raise ValueError("compile: true does not go with plugin: gemini, which moves weights; wanted false")


def _set_accelerator(device: torch.device) -> None:
    """Tells ColossalAI which device to use, before anything of it asks."""
    from colossalai.accelerator import set_accelerator
    from colossalai.accelerator.cpu_accelerator import CpuAccelerator

    if device.type == "cuda":
        set_accelerator("cuda")
        return

    class SynchronousCpu(CpuAccelerator):  # type: ignore[misc]  # ColossalAI has no types
        """A CPU has no streams, and every operation is done when it returns."""

        def synchronize(self, device: Any = None) -> None: ...
        def empty_cache(self) -> None: ...
        def device_count(self) -> int:
            return 1

        def Stream(self, *args: Any, **options: Any) -> None: ...  # noqa: N802 - ColossalAI's name
        def current_stream(self, device: Any = None) -> None: ...
        def stream(self, stream_: Any) -> AbstractContextManager[Any]:
            return nullcontext()

    set_accelerator(SynchronousCpu())


@contextmanager
def _any_device_allowed() -> Iterator[None]:
    """Lets ZeRO be built on a CPU: its check wants a GPU, nothing else in it does."""
    from colossalai.zero.low_level import LowLevelZeroOptimizer

    check = LowLevelZeroOptimizer._sanity_checks
    LowLevelZeroOptimizer._sanity_checks = lambda self: None
    try:
        yield
    finally:
        LowLevelZeroOptimizer._sanity_checks = check


def _import_quietly() -> None:
    """Without ColossalAI's warnings: of optional packages for absent hardware, of older names of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("colossalai.booster.plugin")
    for name in (
        "broadcast_buffers",
        "torch.distributed.all_gather_into_tensor",
        "torch.distributed.reduce_scatter_tensor",
    ):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", FutureWarning)
