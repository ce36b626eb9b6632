"""The tables of docs/planning.md: memory and traffic of a rank for three models on 8 to 1,024 GPUs.

    python -m benchmarks.speed.plan_table [--gpu H100]

Nothing is allocated and no GPU is needed. Seconds are lower bounds from the bandwidths of data sheets.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.plan import PASSES, Transfer
from speedit_plugins.trainer.training.planning import Passes, RankPlan

GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True)
class Gpu:
    """A GPU in NVIDIA's machine of eight.

    Args:
        memory: bytes.
        nvlink: bytes a second that it sends by NVLink: half of the data sheet's sum of both directions.
        network: bytes a second that it sends by its own InfiniBand adapter.
    """

    memory: float
    nvlink: float
    network: float


# Sources: docs/planning.md.
GPUS = {
    "A100": Gpu(80e9, 300e9, 25e9),
    "H100": Gpu(80e9, 450e9, 50e9),
    "H200": Gpu(141e9, 450e9, 50e9),
}


@dataclass(frozen=True)
class Case:
    """A model: its heading, the shipped config, what is changed in it, and samples at a time of a GPU."""

    title: str
    config: str
    changes: tuple[str, ...]
    samples: int


_COMMON = ("experiment_dir=unused", "precision=bf16")
CASES = (
    Case("DiT-XL/2", "image/imagenet_256/dit_xl2.yaml", (), 32),
    Case(
        "A video model of 1B",
        "video/ucf101.yaml",
        (
            "model.type=Latte",
            "model.patch_size=2",
            "model.hidden_size=1408",
            "model.depth=28",
            "model.num_heads=16",
            "model.gradient_checkpointing=true",
        ),
        8,
    ),
    Case(
        "A video model of 10B",
        "video/ucf101.yaml",
        (
            "model.type=Latte",
            "model.patch_size=2",
            "model.hidden_size=4096",
            "model.depth=34",
            "model.num_heads=32",
            "model.gradient_checkpointing=true",
        ),
        2,
    ),
)
NUM_GPUS = (8, 64, 1024)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", choices=GPUS, default="H100")
    gpu = GPUS[parser.parse_args().gpu]
    for case in CASES:
        print("\n".join(table(case, gpu)), end="\n\n")


def table(case: Case, gpu: Gpu) -> Iterator[str]:
    """The lines of the table of a model, in Markdown."""
    config = load_config(case.config, "train", [*_COMMON, *case.changes])
    passes: dict[tuple[bool, bool], Passes] = {}
    first = plan_of(config, case.samples, 1, ("ddp", 1), passes)
    size = sum(parameter.size for parameter in first.training.parameters)
    yield f"### {case.title}"
    yield ""
    yield f"{size / 1e9:.2f} billion weights, {case.samples} samples at a time on each GPU. Config:"
    yield ""
    yield "```text"
    yield " ".join(("-c", case.config, "precision=bf16", *case.changes[:3]))
    if case.changes[3:]:
        yield " ".join(("  ", *case.changes[3:]))
    yield "```"
    yield ""
    yield "| GPUs | plugin | kept | more in a step | in all | sent in a step | takes at least |"
    yield "|---|---|---|---|---|---|---|"
    for count in NUM_GPUS:
        machines = count // GPUS_OF_A_MACHINE
        kinds = [("ddp", 1), ("zero1", 1), ("zero2", 1), ("fsdp2", 1)]
        for plugin, groups in [*kinds, *([("fsdp2", machines)] if machines > 1 else [])]:
            yield row(plan_of(config, case.samples * count, count, (plugin, groups), passes), gpu)


def plan_of(
    config: ExperimentConfig,
    batch_size: int,
    count: int,
    kind: tuple[str, int],
    passes: dict[tuple[bool, bool], Passes],
) -> RankPlan:
    """The plan on `count` GPUs under a plugin and its number of groups. `passes` are counted once for all."""
    plugin, groups = kind
    options: dict[str, Any] = {
        "plugin": plugin,
        "data": replace(config.data, batch_size=batch_size),
        "sharding": replace(config.sharding, replicate=groups),
    }
    return RankPlan(replace(config, **options), count, passes)


def row(found: RankPlan, gpu: Gpu) -> str:
    """One line: bytes in GB, 10^9, and milliseconds."""
    plugin, groups = found.config.plugin, found.config.sharding.replicate
    plan = found.plan(plugin)
    peak = plan.memory.peak(
        found.passes(plugin, is_checkpointed=found.is_checkpointed).peak(found.num_samples)
    )
    name = plugin if groups == 1 else f"{plugin}, {groups} groups"
    fits = "" if peak <= gpu.memory else " (too large)"
    sent = sum(each.sent for each in plan.transfers)
    seconds = least_seconds(plan.transfers, gpu)
    memory = plan.memory
    kept = memory.state - (0 if memory.keeps_gradients else memory.gradients)
    return (
        f"| {found.processes:,} | {name} | {kept / 1e9:.1f} GB | {(peak - kept) / 1e9:.1f} GB"
        f" | {peak / 1e9:.1f} GB{fits} | {sent / 1e9:.1f} GB | {1e3 * seconds:.0f} ms |"
    )


def least_seconds(transfers: Sequence[Transfer], gpu: Gpu) -> float:
    """The time below which no rings can be, if NVLink and the network are both busy all the time.

    Groups are machines: what goes between groups takes a GPU's own adapter. A ring of all GPUs enters and
    leaves a machine by its eight adapters, and passes within it by NVLink.
    """
    within = between = 0.0
    for each in transfers:
        if each.what.endswith("between groups"):
            between += each.sent
            continue
        within += each.sent
        machines = max(1.0, each.ranks / GPUS_OF_A_MACHINE)
        entering = PASSES[each.kind] * each.payload * (machines - 1) / machines
        between += entering / GPUS_OF_A_MACHINE
    return max(within / gpu.nvlink, between / gpu.network)


if __name__ == "__main__":
    main()
