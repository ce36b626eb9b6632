"""Counts what two ranks hold and send in a step. test_plan.py starts it under torchrun and compares.

    torchrun --standalone --nproc_per_node 2 tests/parallel/distributed_plan.py OUT_FOLDER

Rank 0 writes counted.json: for each case the bytes by part, one entry a rank.
"""

import gc
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

# torchrun starts this file as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from distributed_runs import TIMEOUT_SECONDS
from plan_cases import CASES, case_config
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from speedit_plugins.trainer.parallel.runtime import launch, sharing_samples
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

# What the profiler calls a collective, and which of its tensors is the whole one. DDP's sums show below gloo
# alone, the others' gathers and scatters above it.
COLLECTIVES = {
    "gloo:all_reduce": ("all-reduce", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::alltoall_base_": ("all-to-all", 1),
}
NUM_PEAKS = 3
ITEM_BYTES = {"float": 4, "c10::BFloat16": 2}


def local(tensor: Tensor) -> Tensor:
    return getattr(tensor, "to_local", lambda: tensor)().detach()


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages, each counted once."""
    found = {part.untyped_storage()._cdata: part for part in (local(tensor) for tensor in tensors)}
    return sum(part.untyped_storage().nbytes() for part in found.values())


def gradients(trainer: Trainer) -> Iterator[Tensor]:
    engine: Any = trainer.engine
    if hasattr(engine, "_sharded"):
        for store in engine._sharded.pg_to_grad_store.values():
            for group in store._grads_of_params.values():
                for parts in group.values():
                    yield from parts
        return
    for parameter in engine.module.parameters():
        if parameter.grad is not None:
            yield parameter.grad


def held(trainer: Trainer) -> dict[str, int]:
    """Bytes by part between backward pass and optimizer step."""
    engine: Any = trainer.engine
    state = [value for of in engine.optimizer.state.values() for key, value in of.items() if key != "step"]
    copies = list(engine._untrained.values()) if hasattr(engine, "_untrained") else []
    return {
        "weights": num_bytes([*engine.module.parameters(), *engine.module.buffers(), *copies]),
        "gradients": num_bytes(gradients(trainer)),
        "moments": num_bytes(state),
        "masters": num_bytes(m.values for m in engine.masters) if hasattr(engine, "_sharded") else 0,
        "averages": num_bytes(part.values for part in trainer.ema.slices.values()),
    }


class Saved:
    """What autograd keeps of a module's forward pass, without the storages of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.num_bytes = 0
        self._found: list[Tensor] = []
        self._stack = ExitStack()
        self._hooks = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        """Counts no further pass. A kept output refers to itself, so the memory of a pass would stay."""
        for hook in self._hooks:
            hook.remove()
        gc.collect()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        self._found = []
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._stack.enter_context(hooks)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._found.append(tensor.detach())
        return tensor

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._stack.close()
        own = {local(p).untyped_storage()._cdata for p in module.parameters()}
        self.num_bytes = num_bytes(t for t in self._found if t.untyped_storage()._cdata not in own)
        self._found = []


def counted(trainer: Trainer) -> dict[str, Any]:
    """A step that allocates, one with the bytes held and kept, and some with those sent and the most."""
    trainer.engine.model.train()
    trainer.optimizer_step()
    parts: dict[str, Any] = {}
    step = trainer.engine.step

    def counting(lr: float, *, is_healthy: bool) -> Any:
        parts.update(held(trainer))
        return step(lr, is_healthy=is_healthy)

    trainer.engine.step = counting
    saved = Saved(trainer.engine.module)
    trainer.optimizer_step()
    trainer.engine.step = step
    parts["activations"] = saved.num_bytes
    saved.remove()
    parts["most"] = []
    for _ in range(NUM_PEAKS):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as seen:
            trainer.optimizer_step()
        parts["most"].append(most(seen))
    parts["sent"] = sent(seen)
    return parts


def sent(seen: profile) -> dict[str, int]:
    """Bytes of the whole tensors of a step by kind of collective.

    Single numbers do not count, nor what the ranks agree on, in float64.
    """
    found: Counter[str] = Counter()
    for event in seen.profiler.kineto_results.events():
        if event.name() in COLLECTIVES:
            kind, place = COLLECTIVES[event.name()]
            shape, dtype = event.shapes()[place], event.dtypes()[place]
            if dtype != "double" and math.prod(shape) > 1:
                found[kind] += math.prod(shape) * ITEM_BYTES[dtype]
    return dict(found)


def most(seen: profile) -> int:
    """The most bytes that were allocated during the step, beyond those before it.

    Without the copies that gloo makes in a collective. NCCL makes none, and gloo frees them in its own
    threads, where the profiler does not see it.
    """
    copies = set()
    total = peak = 0
    for event, is_copy in sorted(allocations(seen), key=lambda found: found[0].start_time_ns):
        block, num_bytes = event.extra_fields.ptr, event.extra_fields.alloc_size
        if num_bytes > 0 and is_copy:
            copies.add(block)
        elif num_bytes < 0 and block in copies:
            copies.remove(block)
        else:
            # The memory of a copy that was freed unseen may be given away again.
            copies.discard(block)
            total += num_bytes
            peak = max(peak, total)
    return peak


def allocations(seen: profile) -> Iterator[tuple[Any, bool]]:
    """The profiler's events of memory that is taken and freed, and whether they are within a collective."""
    # Popped in their order in time.
    left = [(event, False) for event in reversed(seen.profiler.kineto_results.experimental_event_tree())]
    while left:
        event, is_within = left.pop()
        if hasattr(event.extra_fields, "alloc_size"):
            yield event, is_within
        is_within = is_within or event.name.startswith(("c10d::", "gloo:"))
        left += [(child, is_within) for child in reversed(event.children)]


def main() -> None:
    out = Path(sys.argv[1])
    runtime = launch(case_config(out, CASES["ddp fp32"], distributed_timeout_seconds=TIMEOUT_SECONDS))
    results = {}
    for name, changes in CASES.items():
        config = case_config(out / name, changes)
        trainer = build_trainer(config, sharing_samples(runtime, config))
        results[name] = runtime.gather_objects(counted(trainer))
        if runtime.is_main:
            (out / "counted.json").write_text(json.dumps(results, indent=1))
    runtime.close()


if __name__ == "__main__":
    main()
