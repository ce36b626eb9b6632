"""Two ranks that train together against two independent processes, interleaved in one run.

Each of two one-thread processes holds one trainer per plugin, shared by both ranks, and a trainer of its own
with half the batch. Rounds time a step of each in turn, in alternating order, in both processes at once.
Efficiency is the samples per second of the shared trainer over the sum of the two independent ones. The
optimizer's bytes are counted on the tensors that each rank holds.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.scaling
        [--rounds 7] [--model DiT-S/2] [--batch 8] [--edge 32]
        [--plugins ddp zero1 zero2 fsdp2] [--json OUT]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.spread import Spread
from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.parallel.runtime import Runtime, launch
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

LONE = "independent"


class RandomImages:
    """Normally distributed pixels (3, edge, edge) of random classes: they cost no time to load."""

    num_classes = 1000

    def __init__(self, *, image_size: int) -> None:
        self.edge = image_size

    def __len__(self) -> int:
        return 10_000

    def load(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        image = torch.randn(3, self.edge, self.edge, generator=generator)
        return {"image": image, "label": torch.randint(1000, (), generator=generator)}


DATASETS.register_module(name="RandomImages", module=RandomImages)


def main() -> None:
    """Prints efficiency and optimizer memory per plugin, on rank 0."""
    arguments = _arguments()
    torch.set_num_threads(1)
    config = load_config(
        "configs/image/imagenet_256/base.yaml",
        "train",
        [
            # Nothing is written, and the ranks need one config.
            "experiment_dir=unused",
            f"image_size={arguments.edge}",
            f"model={{type: {arguments.model}, in_channels: 3, input_size: {arguments.edge}}}",
            "encoder=Pixels",
            "data.dataset={type: RandomImages}",
            f"data.batch_size={2 * arguments.batch}",
            "data.num_workers=0",
            "precision=fp32",
            "device=cpu",
        ],
    )
    runtime = launch(config)
    if runtime.world_size != 2:
        raise SystemExit(f"wanted two processes under torchrun, got {runtime.world_size}")
    half = replace(config, data=replace(config.data, batch_size=arguments.batch))
    trainers = {LONE: build_trainer(half, Runtime())}
    for plugin in arguments.plugins:
        trainers[plugin] = build_trainer(replace(config, plugin=plugin), runtime)
    seconds = rounds(trainers, runtime, arguments.rounds)
    _report(trainers, seconds, runtime, arguments)
    runtime.barrier()
    runtime.close()


def rounds(
    trainers: dict[str, Trainer],
    runtime: Runtime,
    num_rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of a step by trainer and round, in the slower process. The first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for trainer in trainers.values():
        trainer.engine.model.train()
    for number in range(num_rounds + 1):
        for name in sorted(trainers, reverse=number % 2 == 1):
            runtime.barrier()
            start = clock()
            trainers[name].optimizer_step()
            own = clock() - start
            times = [float(value) for value in runtime.gather_objects(own)]
            # Independent processes do not wait for each other, so their rates add up.
            taken = 2 / sum(1 / value for value in times) if name == LONE else max(times)
            if number:
                seconds[name].append(taken)
    return seconds


def _report(
    trainers: dict[str, Trainer],
    seconds: dict[str, list[float]],
    runtime: Runtime,
    arguments: argparse.Namespace,
) -> None:
    memory = {name: runtime.gather_objects(_optimizer_bytes(trainer)) for name, trainer in trainers.items()}
    if not runtime.is_main:
        return
    rows = {}
    for name in trainers:
        # Both sides train 2 x batch samples in a round.
        ratios = [lone / shared for lone, shared in zip(seconds[LONE], seconds[name], strict=True)]
        efficiency = Spread.of(ratios)
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "efficiency": efficiency.median,
            "quartiles": (efficiency.low, efficiency.high),
            "efficiency_of_medians": statistics.median(seconds[LONE]) / statistics.median(seconds[name]),
            "optimizer_bytes": memory[name],
        }
        held = " and ".join(f"{size / 2**20:.1f}" for size in memory[name])
        print(
            f"{name:<12} {rows[name]['seconds']:.3f} s  efficiency {efficiency.median:.4f}"
            f" (quartiles {efficiency.low:.4f}, {efficiency.high:.4f};"
            f" of the medians {rows[name]['efficiency_of_medians']:.4f})"
            f"  optimizer {held} MiB"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _optimizer_bytes(trainer: Trainer) -> int:
    states = trainer.engine.optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values() if value.ndim)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8, help="samples per process")
    parser.add_argument("--edge", type=int, default=32, help="edge of the images in pixels")
    parser.add_argument("--plugins", nargs="+", default=["ddp", "zero1", "zero2", "fsdp2"])
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
