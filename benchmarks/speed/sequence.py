"""Two ranks that share samples against two independent processes, interleaved in one run; memory and traffic.

Each of two one-thread processes holds a trainer with `sequence_parallel: 2` per plugin, shared by both ranks,
and a trainer of its own with half the batch. Rounds time a step of each in turn, as in scaling.py, so both
sides do the same work. Efficiency is the samples per second of the shared trainer over the sum of the two
independent ones.

Activations are the bytes that autograd keeps on a rank between forward and backward of one batch, counted as
different storages without parameters: all tokens on one rank, and this rank's part. Traffic is what a rank
sends to others of its group in a step, beside the formula in `formula`.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m benchmarks.speed.sequence
        [--rounds 7] [--model DiT-S/2] [--batch 8] [--edge 32] [--frames 0] [--plugins ddp]
        [--clock wall] [--json OUT]
"""

import argparse
import contextlib
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.scaling import LONE, rounds
from benchmarks.spread import Spread
from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.latte import TemporalAttention
from speedit_plugins.trainer.models.layers.sequence import whole_tokens
from speedit_plugins.trainer.parallel.runtime import Runtime, launch
from speedit_plugins.trainer.training.activations import KeptStorages
from speedit_plugins.trainer.training.assembly import build_trainer


class RandomClips:
    """Normally distributed clips (3, frames, edge, edge): they cost no time to load."""

    def __init__(self, *, image_size: int, num_frames: int) -> None:
        self.shape = (3, num_frames, image_size, image_size)

    def __len__(self) -> int:
        return 10_000

    def load(self, index: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"video": torch.randn(self.shape, generator=generator)}


DATASETS.register_module(name="RandomClips", module=RandomClips)


def main() -> None:
    """Prints efficiency, activations and traffic per plugin, on rank 0."""
    arguments = _arguments()
    torch.set_num_threads(1)
    config = _config(arguments)
    runtime = launch(config)
    if runtime.world_size != 2:
        raise SystemExit(f"wanted two processes under torchrun, got {runtime.world_size}")
    half = replace(config, sequence_parallel=1, data=replace(config.data, batch_size=arguments.batch))
    trainers = {LONE: build_trainer(half, Runtime())}
    for plugin in arguments.plugins:
        trainers[plugin] = build_trainer(replace(config, plugin=plugin), runtime)
    shared = trainers[arguments.plugins[0]]
    # Before the first step: an engine may change what the model is called with.
    kept = {
        name: _kept(shared.model, 2 * arguments.batch, is_whole=name == "whole") for name in ("whole", "part")
    }
    group = shared.model.sequence
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    seconds = rounds(trainers, runtime, arguments.rounds, clock)
    before = group.sent_bytes
    shared.optimizer_step()
    sent = group.sent_bytes - before
    everyone = runtime.gather_objects((kept["part"], sent))
    if runtime.is_main:
        _report(seconds, kept["whole"], everyone, formula(shared.model, 2 * arguments.batch, 2), arguments)
    runtime.barrier()
    runtime.close()


def formula(model: nn.Module, batch: int, size: int) -> int:
    """Bytes in fp32 that a rank sends in a step, where its group divides the tokens evenly.

    An attention among all N tokens sends queries, keys and values of B N D / P numbers each, and its output,
    all but the own 1 / P of them; the gradients go back the same way. At the end a rank sends its part of the
    prediction to P - 1 others. Source: Jacobs et al. 2023, arXiv:2309.14509, section 3.2, with P - 1 in place
    of P, as what stays on a rank is not sent.
    """
    assert isinstance(model, DiT)
    attentions = [each for each in model.modules() if hasattr(each, "qkv")]
    num_exchanging = sum(not isinstance(each, TemporalAttention) for each in attentions)
    D = model.pos_embed.shape[2]
    numbers = batch * model.num_tokens * (size - 1)
    at_end = numbers // size * model.patch_size**2 * model.out_channels
    return 4 * (num_exchanging * 2 * 4 * numbers * D // size**2 + at_end)


def _kept(model: nn.Module, batch: int, *, is_whole: bool) -> int:
    """Bytes that autograd keeps of a forward pass of the bare model."""
    assert isinstance(model, DiT)
    edge = model.input_size
    frames = (model.num_frames,) if hasattr(model, "num_frames") else ()
    x = torch.randn(batch, model.in_channels, *frames, edge, edge)
    label = torch.randint(model.num_classes, (batch,)) if model.num_classes else None
    model.train()
    storages = KeptStorages(model)
    with storages.kept(), whole_tokens(model) if is_whole else contextlib.nullcontext():
        model(x, torch.rand(batch), label)
    return storages.num_bytes


def _config(arguments: argparse.Namespace) -> ExperimentConfig:
    edge, frames = arguments.edge, arguments.frames
    is_video = frames > 0
    sizes = f"input_size: {edge}, in_channels: 3" + (f", num_frames: {frames}" if is_video else "")
    return load_config(
        f"configs/{'video' if is_video else 'image/imagenet_256'}/base.yaml",
        "train",
        [
            # Nothing is written, and the ranks need one config.
            "experiment_dir=unused",
            "sequence_parallel=2",
            f"image_size={edge}",
            f"num_frames={frames}",
            f"model={{type: {arguments.model}, {sizes}}}",
            "encoder=Pixels",
            f"data.dataset={{type: {'RandomClips' if is_video else 'RandomImages'}}}",
            f"data.batch_size={2 * arguments.batch}",
            "data.num_workers=0",
            "precision=fp32",
            "device=cpu",
        ],
    )


def _report(
    seconds: dict[str, list[float]],
    whole: int,
    everyone: list[tuple[int, int]],
    expected: int,
    arguments: argparse.Namespace,
) -> None:
    rows: dict[str, Any] = {
        "activation_bytes": {"whole": whole, "part": [part for part, _ in everyone]},
        "sent_bytes": {"formula": expected, "counted": [sent for _, sent in everyone]},
    }
    for part, sent in everyone:
        print(f"activations {part / 2**20:.1f} of {whole / 2**20:.1f} MiB: {part / whole:.4f}")
        print(f"sent {sent / 2**20:.3f} MiB a step, by the formula {expected / 2**20:.3f} MiB")
    for plugin in arguments.plugins:
        # Both sides train 2 x batch samples in a round.
        ratios = [lone / shared for lone, shared in zip(seconds[LONE], seconds[plugin], strict=True)]
        efficiency = Spread.of(ratios)
        rows[plugin] = {
            "seconds": statistics.median(seconds[plugin]),
            "efficiency": efficiency.median,
            "quartiles": (efficiency.low, efficiency.high),
        }
        print(
            f"{plugin:<6} {rows[plugin]['seconds']:.3f} s  efficiency {efficiency.median:.4f}"
            f" (quartiles {efficiency.low:.4f}, {efficiency.high:.4f})"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--batch", type=int, default=8, help="samples per process")
    parser.add_argument("--edge", type=int, default=32, help="edge of the images in pixels")
    parser.add_argument("--frames", type=int, default=0, help="frames of a clip, for Latte")
    parser.add_argument("--plugins", nargs="+", default=["ddp"])
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu counts the work of each process, without its waiting: for a machine with other work",
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
