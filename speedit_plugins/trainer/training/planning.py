"""What --dry-run says of the ranks of a training: their memory by parts, what they send, and what fits."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer import build
from speedit_plugins.trainer.accelerations.build import build_accelerations
from speedit_plugins.trainer.accelerations.objective import Acceleration
from speedit_plugins.trainer.accelerations.teachers import unread_teacher
from speedit_plugins.trainer.config.optimizers import OPTIMIZER_FACTS
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.config.training_checks import check_optimizer as check_optimizer_keys
from speedit_plugins.trainer.parallel.gemini import check_gemini
from speedit_plugins.trainer.parallel.optimizers import check_optimizer
from speedit_plugins.trainer.parallel.plan import PLANS, ParameterSize, Plan, Training, Transfer
from speedit_plugins.trainer.parallel.runtime import Runtime, num_parts
from speedit_plugins.trainer.parallel.units import units
from speedit_plugins.trainer.starting_weights import start_from
from speedit_plugins.trainer.training.activations import Activations, activations

CHECKPOINTING = "gradient_checkpointing"
NOT_COUNTED = "what CUDA, NCCL and the allocator take, encoders and teachers, samples drawn in the training"


@dataclass(frozen=True)
class Passes:
    """Activations of a rank, in bytes, by the number of its samples: `fixed` and so many `per_sample`.

    Args:
        recomputed: the same of what the backward pass adds for a time where blocks compute again. The larger
            of several counts.
        exchanged: bytes of a sample's tokens that ranks with parts of it exchange in a step's batch, by rank.
    """

    fixed: float
    per_sample: float
    recomputed: tuple[tuple[float, float], ...] = ((0.0, 0.0),)
    exchanged: float = 0.0

    def kept(self, num_samples: int) -> int:
        """Bytes between forward and backward pass."""
        return math.ceil(self.fixed + self.per_sample * num_samples)

    def peak(self, num_samples: int) -> int:
        """The most at a time: what is kept, and what is computed again."""
        again = max(fixed + per_sample * num_samples for fixed, per_sample in self.recomputed)
        return self.kept(num_samples) + math.ceil(again)

    def most_samples(self, num_bytes: int) -> int:
        """The most samples whose peak takes so many bytes; 0 if one takes more."""
        lines = [(self.fixed + fixed, self.per_sample + per_sample) for fixed, per_sample in self.recomputed]
        return max(0, min(int((num_bytes - fixed) // slope) if slope else 0 for fixed, slope in lines))


class RankPlan:
    """The plans of a config for a number of processes, without allocating its model.

    Args:
        config: checked for the phase train.
        processes: of the training; None is the fewest that the config can do with.
        passes: activations that are known, by whether the model is cast and checkpointed. Others are added.

    Raises:
        ValueError: the processes cannot share the batch, or cannot be grouped as `sharding.replicate` says.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        processes: int | None = None,
        passes: dict[tuple[bool, bool], Passes] | None = None,
    ) -> None:
        copies = config.sharding.replicate
        # Ranks that share the tokens of a sample.
        self.sequence_size = config.sequence_parallel
        if processes is None:
            processes = math.lcm(self.sequence_size, copies)
        parts = num_parts(config, processes)
        if processes % copies:
            raise ValueError(
                f"sharding.replicate: wanted a divisor of the number of processes, {processes}, got {copies}"
            )
        self.config, self.processes = config, processes
        self.num_samples = config.data.batch_size // parts
        self._passes = {} if passes is None else passes

    @property
    def is_checkpointed(self) -> bool:
        """Whether the config has the model compute its activations again."""
        return bool(self.config.model.get(CHECKPOINTING, False))

    @cached_property
    def can_checkpoint(self) -> bool:
        """Whether the model can compute its activations again."""
        builder = MODELS.get(str(self.config.model["type"]))
        return builder is not None and CHECKPOINTING in inspect.signature(builder).parameters

    @cached_property
    def training(self) -> Training:
        """What the plans of all plugins depend on."""
        model, accelerations = on_meta(self.config)
        facts, ema = OPTIMIZER_FACTS.get(self.config.optimizer.type), self.config.ema
        unit_of = {id(p): number for number, unit in enumerate(units(model)) for p in unit.parameters()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        return Training(
            parameters=tuple(
                ParameterSize(tuple(p.shape), p.requires_grad, unit_of.get(id(p))) for p in model.parameters()
            ),
            precision=self.config.precision,
            moment_bytes=0.0 if facts is None else facts.state_bytes,
            num_averages={"none": 0, "power": len(ema.sigma_rel)}.get(ema.type, 1),
            buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
            untrained_bytes=sum(v.nbytes for name, v in model.state_dict().items() if name not in trained),
            teacher_bytes=_num_bytes([each.state_dict() for each in accelerations]),
            grad_accumulation=self.config.optimizer.grad_accumulation,
            cpu_offload=self.config.sharding.cpu_offload,
        )

    def plan(self, plugin: str) -> Plan:
        """Memory and traffic of a rank under a plugin."""
        copies = self.config.sharding.replicate if plugin == "fsdp2" else 1
        found = PLANS[plugin](self.training, self.processes, copies)
        if self.sequence_size == 1:
            return found
        passes = self.passes(plugin, is_checkpointed=self.is_checkpointed)
        payload = int(passes.exchanged * self.num_samples) * self.training.grad_accumulation
        if not payload:
            # Attentions of diffusers are not counted.
            return found
        tokens = Transfer("all-to-all", "tokens for heads and back", payload, self.sequence_size)
        return replace(found, transfers=(*found.transfers, tokens))

    def passes(self, plugin: str, *, is_checkpointed: bool) -> Passes:
        """Activations of a rank under a plugin."""
        is_cast = plugin != "ddp" and self.config.precision != "fp32"
        key = (is_cast, is_checkpointed)
        if key not in self._passes:
            self._passes[key] = self._counted(is_cast, is_checkpointed)
        return self._passes[key]

    def refusal(self, plugin: str) -> str | None:
        """Why the config cannot use a plugin; None if it can."""
        config = replace(self.config, plugin=cast(Any, plugin))
        try:
            check_optimizer_keys(config)
            check_optimizer(config)
            if plugin == "gemini" and self.sequence_size > 1:
                return "it is not tried with sequence_parallel"
            if plugin == "gemini":
                check_gemini(config, Runtime(device=torch.device("cuda")))
        except ValueError as error:
            return " ".join(str(error).split())
        if plugin == "fsdp2" and not all(parameter.shape for parameter in self.training.parameters):
            return "a parameter is a single number and has no rows"
        return None

    def _counted(self, is_cast: bool, is_checkpointed: bool) -> Passes:
        """From two batches, since autocast's copies of weights do not grow with the batch."""
        n = self.num_samples
        few, more = (self._count(size, is_cast, is_checkpointed) for size in (n, 2 * n))
        fixed, per_sample = _line(few.kept, more.kept, n)
        attended = few.attended / n
        # Queries, keys, values and what comes out, forward and backward.
        exchanged = 4 * 2 * attended
        if self.sequence_size > 1 and not is_checkpointed:
            # What comes out is kept twice: as it leaves the attention, and as it comes back from other ranks.
            per_sample += attended
        recomputed = [(0.0, 0.0)]
        if is_checkpointed:
            few, more = (self._count(size, is_cast, False) for size in (n, 2 * n))
            # In the forward pass autocast holds its copies of all weights, gone when a block computes again.
            copies = _line(few.kept, more.kept, n)[0] - fixed
            recomputed = [_line(few.largest_unit, more.largest_unit, n), (copies, 0.0)]
            exchanged *= 1.5
        # A rank has its part of the tokens.
        parts = self.sequence_size
        again = tuple((own, slope / parts) for own, slope in recomputed)
        return Passes(fixed, per_sample / parts, again, exchanged / parts)

    def _count(self, num_samples: int, is_cast: bool, is_checkpointed: bool) -> Activations:
        config = self.config
        if self.can_checkpoint:
            config = replace(config, model={**config.model, CHECKPOINTING: is_checkpointed})
        model, found = on_meta(config)
        options: dict[str, Any] = {"precision": config.precision, "is_cast": is_cast, "accelerations": found}
        return activations(model, num_samples, **options)


def on_meta(config: ExperimentConfig) -> tuple[nn.Module, Sequence[Acceleration]]:
    """The model and the accelerations of a training on the meta device.

    Raises:
        ValueError: the model cannot do what the config asks for.
    """
    process = build.build_process(config, respaced=True)
    with torch.device("meta"):
        model = build.build_model(config)
        start_from(model, None, config)
        return model, build_accelerations(config, model, process, unread_teacher(config))


def plan_lines(found: RankPlan, gpu_memory: int | None = None) -> Iterator[tuple[str, str]]:
    """Name and text of each line about the ranks.

    Args:
        gpu_memory: bytes of a GPU; None asks for no table of plugins.
    """
    config = found.config
    yield "memory of a rank", _head(found)
    yield from _memory(found)
    yield "  not counted", NOT_COUNTED
    transfers = found.plan(config.plugin).transfers
    if transfers:
        yield "sent by a rank", f"{size(sum(each.sent for each in transfers))} in a step"
        for each in transfers:
            yield f"  {each.kind}", f"{size(each.sent)}, {each.what}, among {each.ranks} ranks"
    if gpu_memory is not None:
        many = f"{found.processes} GPUs" if found.processes > 1 else "1 GPU"
        yield "plugins", f"on {many} of {size(gpu_memory)}"
        for plugin in PLANS:
            yield f"  {plugin}", _fit(found, plugin, gpu_memory)


def _head(found: RankPlan) -> str:
    config = found.config
    copies = f" in {config.sharding.replicate} groups" if config.sharding.replicate > 1 else ""
    many = f"{found.processes} processes{copies}" if found.processes > 1 else "1 process"
    return f"{many}, {config.plugin}, {config.precision}, {found.num_samples} samples at a time"


def _memory(found: RankPlan) -> Iterator[tuple[str, str]]:
    config, memory = found.config, found.plan(found.config.plugin).memory
    name = config.optimizer.type
    unknown = "" if name in OPTIMIZER_FACTS else f"unknown for {name}, "
    averages = found.training.num_averages
    parts = {
        "weights": (memory.weights, ""),
        "gradients": (memory.gradients, ""),
        "masters": (memory.masters, ", float32"),
        "moments": (memory.moments, f", {unknown}{name}"),
        "averages": (memory.averages, "" if averages == 1 else f", {averages} of the weights"),
        "teacher": (memory.teacher, f", {config.alignment.type}"),
        "buffers": (memory.backward_buffers, ", of gradients and gathered weights in the backward pass"),
        "on the CPU": (memory.on_cpu, ", in place of the device"),
    }
    passes = found.passes(config.plugin, is_checkpointed=found.is_checkpointed)
    for part, (num_bytes, text) in parts.items():
        if num_bytes or unknown and part == "moments":
            yield f"  {part}", f"{size(num_bytes)}{text}"
    yield "  activations", _activations(found, passes)
    yield "  in all", f"at most about {size(memory.peak(passes.peak(found.num_samples)))} at a time"


def _activations(found: RankPlan, passes: Passes) -> str:
    n = found.num_samples
    text = size(passes.kept(n))
    if more := passes.peak(n) - passes.kept(n):
        text += f" and {size(more)} while a block computes again"
    if found.can_checkpoint:
        other = found.passes(found.config.plugin, is_checkpointed=not found.is_checkpointed)
        value = str(not found.is_checkpointed).lower()
        text += f"; {size(other.peak(n))} with model.{CHECKPOINTING}={value}"
    return text


def _fit(found: RankPlan, plugin: str, gpu_memory: int) -> str:
    """Whether a rank fits into a GPU, and the batch with which it does."""
    refusal = found.refusal(plugin)
    if refusal is not None:
        return f"left out: {refusal}"
    plan, own = found.plan(plugin), found.is_checkpointed
    text = _largest(found, plugin, plan, gpu_memory, is_checkpointed=own)
    if plan.transfers:
        # Of the config as it is: blocks that compute again exchange their tokens again.
        text += f", sends {size(sum(each.sent for each in plan.transfers))} in a step"
    if found.can_checkpoint:
        text += f"; {_largest(found, plugin, plan, gpu_memory, is_checkpointed=not own)}"
    return text


def _largest(found: RankPlan, plugin: str, plan: Plan, gpu_memory: int, *, is_checkpointed: bool) -> str:
    """Whether the config's batch fits, and the largest that does."""
    how = ""
    if is_checkpointed != found.is_checkpointed:
        how = f" {'with' if is_checkpointed else 'without'} {CHECKPOINTING}"
    passes = found.passes(plugin, is_checkpointed=is_checkpointed)
    peak = plan.memory.peak(passes.peak(found.num_samples))
    text = f"{'fits' if peak <= gpu_memory else 'too large'}{how}: {size(peak)}"
    most = passes.most_samples(plan.memory.most_activations(gpu_memory))
    if not most:
        return f"{text}, no batch fits"
    end = " fits" if peak > gpu_memory else ""
    return f"{text}, data.batch_size up to {most * found.processes // found.sequence_size}{end}"


def size(num_bytes: int) -> str:
    """Bytes as text, in MiB, GiB or TiB."""
    for exponent, unit in ((40, "TiB"), (30, "GiB")):
        if num_bytes >= 2**exponent:
            return f"{num_bytes / 2**exponent:.2f} {unit}"
    return f"{num_bytes / 2**20:.1f} MiB"


def _line(few: int, more: int, step: int) -> tuple[float, float]:
    """Value at 0 and slope of the line through (step, few) and (2 step, more)."""
    return 2.0 * few - more, (more - few) / step


def _num_bytes(states: Sequence[dict[str, Any]]) -> int:
    return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))
