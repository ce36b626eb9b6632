"""What a rank holds and sends in a step under each plugin, in bytes. Nothing is allocated.

Every number is for rank 0: it has the most. Other ranks have less by a row of a parameter at most.

Sources: the engines of this folder, and the code of ColossalAI 0.5.0's LowLevelZeroOptimizer and of torch's
`fully_shard`. The volumes of collectives are those of rings: Patarasuk and Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations"; Rajbhandari et al. 2020, arXiv:1910.02054, section 7.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

# Elements of a bucket of gradients. Source: `reduce_bucket_size_in_m` of ColossalAI's LowLevelZeroPlugin.
ZERO_BUCKET = 12 * 2**20
# Elements of the smallest chunk. Source: `min_chunk_size_m` of ColossalAI's GeminiPlugin.
GEMINI_CHUNK = 32 * 2**20
FLOAT32 = 4

# How often the whole tensors go around a ring.
PASSES = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}


@dataclass(frozen=True)
class ParameterSize:
    """One parameter: its shape, whether it is trained, and the number of its unit, None if it is in none."""

    shape: tuple[int, ...]
    is_trained: bool
    unit: int | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the plan of a training depends on.

    Args:
        parameters: of the model, those of a unit one after the other.
        precision: fp32, bf16 or fp16.
        moment_bytes: bytes of the optimizer's state for each trained weight.
        num_averages: averages of the weights.
        buffer_bytes: of the model's buffers.
        untrained_bytes: of the frozen tensors and buffers that a checkpoint has.
        teacher_bytes: of what accelerations keep on every rank.
        grad_accumulation: batches of a step.
        cpu_offload: whether fsdp2 keeps its rows in the memory of the CPU.
    """

    parameters: tuple[ParameterSize, ...]
    precision: str = "fp32"
    moment_bytes: float = 8.0
    num_averages: int = 1
    buffer_bytes: int = 0
    untrained_bytes: int = 0
    teacher_bytes: int = 0
    grad_accumulation: int = 1
    cpu_offload: bool = False

    @property
    def trained(self) -> list[ParameterSize]:
        """The parameters that the optimizer moves."""
        return [parameter for parameter in self.parameters if parameter.is_trained]

    @property
    def item(self) -> int:
        """Bytes of a number in the precision."""
        return FLOAT32 if self.precision == "fp32" else 2


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on the device of a rank, without activations.

    Args:
        keeps_gradients: whether gradients have memory before the backward pass. Otherwise they come as the
            activations go.
        backward_buffers: beside the activations and gradients of the backward pass.
        first_bucket: share of the gradients that are there when the buffers are first used.
        step_buffers: while the optimizer steps, when the activations are gone.
        on_cpu: in the memory of the CPU.
    """

    weights: int
    gradients: int
    moments: int
    averages: int
    masters: int = 0
    teacher: int = 0
    keeps_gradients: bool = False
    backward_buffers: int = 0
    first_bucket: float = 0.0
    step_buffers: int = 0
    on_cpu: int = 0

    @property
    def state(self) -> int:
        """All but the buffers."""
        held = self.weights + self.gradients + self.moments + self.averages
        return held + self.masters + self.teacher

    def peak(self, activations: int) -> int:
        """The most at any time of a step, with so many bytes of activations."""
        most = max(self._while_backward(activations), self.gradients + self.step_buffers)
        return self.state - self.gradients + most

    def most_activations(self, num_bytes: int) -> int:
        """The most activations with which no more than so many bytes are needed; below 0 if none are."""
        if self.peak(0) > num_bytes:
            return -1
        low, high = 0, num_bytes
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.peak(middle) <= num_bytes else (low, middle - 1)
        return low

    def _while_backward(self, activations: int) -> int:
        """Activations, gradients and buffers: the first go as evenly as the second come."""
        left = math.ceil((1 - self.first_bucket) * activations)
        if self.keeps_gradients:
            return self.gradients + max(activations, left + self.backward_buffers)
        come = math.ceil(self.first_bucket * self.gradients)
        return max(activations, max(left + come, self.gradients) + self.backward_buffers)


@dataclass(frozen=True)
class Transfer:
    """Collectives of a kind in a step.

    Args:
        kind: all-reduce, all-gather, reduce-scatter or all-to-all.
        what: what is transferred.
        payload: bytes of the whole tensors, of all collectives of the step; of an all-to-all, a rank's own.
        ranks: how many ranks take part in each.
    """

    kind: str
    what: str
    payload: int
    ranks: int

    @property
    def sent(self) -> int:
        """Bytes that each rank sends over a ring, where an all-reduce goes around twice."""
        return PASSES[self.kind] * self.payload * (self.ranks - 1) // self.ranks


@dataclass(frozen=True)
class Plan:
    """The memory of a rank, and what it sends in a step."""

    memory: RankMemory
    transfers: tuple[Transfer, ...]


def ddp(training: Training, processes: int, replicate: int = 1) -> Plan:
    """The plan of `Replica`: all on every rank but the average, which each rank keeps of its slices.

    Gradients are views of the buckets in which they are summed.
    """
    sizes = [parameter.size for parameter in training.trained]
    trained = FLOAT32 * sum(sizes)
    buffers = 0
    if processes > 1:
        # A gradient is copied into its bucket. Those of earlier batches of a step are beside the buckets.
        buffers = FLOAT32 * max(sizes, default=0) + (trained if training.grad_accumulation > 1 else 0)
    memory = RankMemory(
        weights=FLOAT32 * sum(p.size for p in training.parameters) + training.buffer_bytes,
        gradients=trained,
        moments=int(training.moment_bytes * sum(sizes)),
        averages=training.num_averages * FLOAT32 * _shares(sizes, processes),
        teacher=training.teacher_bytes,
        # Those of DDP's buckets stay.
        keeps_gradients=processes > 1 or training.grad_accumulation > 1,
        backward_buffers=buffers,
    )
    return Plan(memory, _transfers(Transfer("all-reduce", "gradients, float32", trained, processes)))


def zero1(training: Training, processes: int, replicate: int = 1) -> Plan:
    """The plan of `ZeroEngine` with whole gradients, in the precision of the model."""
    return _zero(training, processes, shards_gradients=False)


def zero2(training: Training, processes: int, replicate: int = 1) -> Plan:
    """The plan of `ZeroEngine` with sharded gradients, in the precision of the model."""
    return _zero(training, processes, shards_gradients=True)


def fsdp2(training: Training, processes: int, replicate: int = 1) -> Plan:
    """The plan of `FullyShardedEngine`: rows of everything, padded to the same number on all ranks.

    Each unit is gathered for its forward and its backward pass, the rest once. While a unit computes, the
    next is gathered, and the gradients of the one before are summed.
    """
    shards, item = processes // replicate, training.item

    def rows(parameters: Iterable[ParameterSize]) -> int:
        return sum(math.ceil(p.shape[0] / shards) * (p.size // p.shape[0]) for p in parameters)

    trained, held = rows(training.trained), rows(training.parameters)
    rest = shards * rows(p for p in training.parameters if p.unit is None)
    units: dict[int, list[ParameterSize]] = {}
    for parameter in training.parameters:
        if parameter.unit is not None:
            units.setdefault(parameter.unit, []).append(parameter)
    largest = shards * max(map(rows, units.values()), default=0)
    summed = shards * max((rows(p for p in unit if p.is_trained) for unit in units.values()), default=0)
    sharded = [
        FLOAT32 * held,
        FLOAT32 * trained,
        int(training.moment_bytes * trained),
        training.num_averages * FLOAT32 * trained,
    ]
    on_device = [0, 0, 0, 0] if training.cpu_offload else sharded
    memory = RankMemory(
        weights=on_device[0] + training.buffer_bytes,
        gradients=on_device[1],
        moments=on_device[2],
        averages=on_device[3],
        teacher=training.teacher_bytes,
        keeps_gradients=training.grad_accumulation > 1,
        backward_buffers=item * (rest + 2 * largest + summed) + FLOAT32 * summed,
        on_cpu=sum(sharded) if training.cpu_offload else 0,
    )
    count = training.grad_accumulation
    gathered = count * item * (2 * (shards * held - rest) + rest)
    name = "float32" if item == FLOAT32 else training.precision
    return Plan(
        memory,
        _transfers(
            Transfer("all-gather", f"weights, {name}", gathered, shards),
            Transfer("reduce-scatter", "gradients, float32", count * FLOAT32 * shards * trained, shards),
            Transfer(
                "all-reduce", "gradients, float32, between groups", count * FLOAT32 * trained, replicate
            ),
        ),
    )


def gemini(training: Training, processes: int, replicate: int = 1) -> Plan:
    """The plan of `GeminiEngine`, without the padding of its chunks. Gradients reuse the memory of weights.

    It was read from the code alone: gemini needs CUDA.
    """
    size, item = sum(p.size for p in training.parameters), training.item
    trained = sum(p.size for p in training.trained)
    own = math.ceil(trained / processes)
    memory = RankMemory(
        weights=item * math.ceil(size / processes) + training.buffer_bytes + training.untrained_bytes,
        # Only with accumulation they have chunks of their own.
        gradients=item * own if training.grad_accumulation > 1 else 0,
        moments=int(training.moment_bytes * own),
        averages=training.num_averages * FLOAT32 * own,
        masters=FLOAT32 * own,
        teacher=training.teacher_bytes,
        keeps_gradients=training.grad_accumulation > 1,
        backward_buffers=2 * item * GEMINI_CHUNK,
    )
    count, name = training.grad_accumulation, training.precision
    return Plan(
        memory,
        _transfers(
            Transfer("all-gather", f"weights, {name}", 2 * count * item * size, processes),
            Transfer("reduce-scatter", f"gradients, {name}", count * item * trained, processes),
        ),
    )


PLANS: dict[str, Callable[[Training, int, int], Plan]] = {
    "ddp": ddp,
    "zero1": zero1,
    "zero2": zero2,
    "fsdp2": fsdp2,
    "gemini": gemini,
}


def _zero(training: Training, processes: int, *, shards_gradients: bool) -> Plan:
    """ZeRO with whole weights in the precision of the model, and float32 masters of this rank's slices."""
    sizes, item = [parameter.size for parameter in training.trained], training.item
    own = _shares(sizes, processes)
    padded = own * processes
    frozen = sum(p.size for p in training.parameters if not p.is_trained)
    bucket = min(padded, max(ZERO_BUCKET, max(sizes, default=0)))
    held = own if shards_gradients else padded
    # A bucket's gradients are flattened in a copy. With whole gradients, what the copy replaces is counted.
    copies = 2 if shards_gradients or training.grad_accumulation > 1 else 1
    # In half precision the slice of the gradients is cast for the optimizer.
    cast = 0 if item == FLOAT32 else FLOAT32 * own
    # After the step, new slices are cast, flattened, and gathered by the bucket.
    flat = min(own, ZERO_BUCKET)
    gathering = item * flat * (processes + 1) + (0 if item == FLOAT32 else item * flat)
    memory = RankMemory(
        # Frozen tensors are kept as they were beside those that are cast.
        weights=item * (padded + frozen) + training.buffer_bytes + training.untrained_bytes,
        gradients=item * held,
        moments=int(training.moment_bytes * own),
        averages=training.num_averages * FLOAT32 * own,
        masters=FLOAT32 * own,
        teacher=training.teacher_bytes,
        keeps_gradients=training.grad_accumulation > 1,
        backward_buffers=item * copies * bucket,
        first_bucket=bucket / max(padded, 1),
        # The optimizer frees the cast gradients before it gathers.
        step_buffers=max(cast, gathering),
    )
    name = "float32" if item == FLOAT32 else training.precision
    kind = "reduce-scatter" if shards_gradients else "all-reduce"
    gradients = training.grad_accumulation * item * padded
    return Plan(
        memory,
        _transfers(
            Transfer(kind, f"gradients, {name}", gradients, processes),
            Transfer("all-gather", f"weights, {name}", item * padded, processes),
        ),
    )


def _shares(sizes: Sequence[int], processes: int) -> int:
    """Elements of rank 0's slices of parameters that are cut into equal slices, padded."""
    return sum(math.ceil(size / processes) for size in sizes)


def _transfers(*found: Transfer) -> tuple[Transfer, ...]:
    return tuple(transfer for transfer in found if transfer.ranks > 1 and transfer.payload)
