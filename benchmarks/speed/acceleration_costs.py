"""What an acceleration costs: training steps with it and without, in turn, in one run.

    python -m benchmarks.speed.acceleration_costs blocks      options of a DiT's blocks
    python -m benchmarks.speed.acceleration_costs objective   routing, and what changes the noise or the loss
    python -m benchmarks.speed.acceleration_costs alignment   REPA and SRA
    python -m benchmarks.speed.acceleration_costs assignment  milliseconds to assign a batch's noise
        [--rounds 9] [--threads 1] [--only TEXT]

The ratio is taken within a round, so that a machine that others use too slows both sides. Memory is what one
step keeps for its backward pass. A step of `blocks` is forward, mean square, backward and AdamW; of
`objective` noising, forward, loss, backward and AdamW, both on a fixed batch; of `alignment` it is the
trainer's, with its data and its average of the weights.

Dims: B samples, C channels, H x W pixels.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.spread import Spread
from speedit_plugins.policies.build import build_policy
from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.accelerations.build import build_accelerations
from speedit_plugins.trainer.accelerations.noise_assignment import assignment
from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.inputs import ModelInputs
from speedit_plugins.trainer.training.assembly import build_trainer

CONFIG = "configs/image/digits/speedit.yaml"
# 256 tokens, as latents of a 256 x 256 image have.
SHAPE: Mapping[str, Any] = {
    "type": "DiT",
    "input_size": 32,
    "patch_size": 2,
    "num_classes": 10,
    "class_dropout_prob": 0.0,
}
BATCH = 8
BLOCKS_SHAPE: Mapping[str, Any] = {**SHAPE, "hidden_size": 256, "depth": 4, "num_heads": 4}
# As many blocks as DiT-B, since a route leaves out the first and the last ones.
OBJECTIVE_SHAPE: Mapping[str, Any] = {
    **SHAPE,
    "hidden_size": 192,
    "depth": 12,
    "num_heads": 3,
    "learn_sigma": False,
}
# 64 tokens.
ALIGNMENT_MODEL = ("model.hidden_size=128", "model.depth=4", "model.num_heads=4", "model.patch_size=1")
ASSIGNED = (8, 32, 128, 512)

NOTHING = "nothing"
BLOCKS: Mapping[str, Any] = {
    NOTHING: {},
    "norm: rms": {"norm": "rms"},
    "norm: rms, qk_norm: true": {"norm": "rms", "qk_norm": True},
    "rope: true": {"rope": True},
    "perceptron: swiglu": {"perceptron": "swiglu"},
    "all four": {"norm": "rms", "qk_norm": True, "rope": True, "perceptron": "swiglu"},
    "all but qk_norm": {"norm": "rms", "rope": True, "perceptron": "swiglu"},
}
OBJECTIVES: Mapping[str, Any] = {
    NOTHING: (),
    "routing: {keep: 0.5}": ("routing.keep=0.5",),
    "routing: {keep: 0.25}": ("routing.keep=0.25",),
    "noise_assignment: batch": ("noise_assignment=batch",),
    "uncertainty: true": ("uncertainty=true",),
    "contrastive: {weight: 0.05}": ("contrastive.weight=0.05",),
}
_REPA = "type: REPA, teacher: embedded, layer: 2"
ALIGNMENTS: Mapping[str, Any] = {
    NOTHING: (),
    "REPA, embedded at 128 pixels": (f"alignment={{{_REPA}}}",),
    "REPA, embedded at 32 pixels": (f"alignment={{{_REPA}, teacher_size: 32}}",),
    "REPA after its end": (f"alignment={{{_REPA}, until: 1}}",),
    "SRA, blocks 1 to 2": ("alignment={type: SRA, layer: 1}",),
}


@dataclass(frozen=True)
class Side:
    """A training.

    Args:
        model: with what is trained beside it.
        step: makes a step.
    """

    model: nn.Module
    step: Callable[[], object]

    def seconds(self) -> float:
        """Makes a step and returns its time on the clock."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    @property
    def num_trained(self) -> int:
        """Weights that the training changes."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a row for each acceleration: ratios of time and memory, and its trained weights."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.compared == "assignment":
        _print_assignments(arguments.rounds)
        return
    rows, side = COMPARED[arguments.compared]
    print("| changed | time of a step | kept memory | trained weights |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, options in rows.items():
            if arguments.only in name:
                plain, changed = side(rows[NOTHING], Path(folder)), side(options, Path(folder))
                print(f"| `{name}` | {_row(plain, changed, arguments.rounds)} |", flush=True)


def _row(plain: Side, changed: Side, rounds: int) -> str:
    time_spread = time_ratio(plain, changed, rounds)
    memory = kept_bytes(changed) / kept_bytes(plain)
    weights = f"{changed.num_trained:,} ({changed.num_trained / plain.num_trained:.3f})"
    spread = f"{time_spread.median:.2f} ({time_spread.low:.2f} to {time_spread.high:.2f})"
    return f"{spread} | {memory:.2f} | {weights}"


def time_ratio(plain: Side, changed: Side, rounds: int) -> Spread:
    """The seconds of a changed step over a plain one, after a first round that does not count."""
    ratios = []
    for number in range(rounds + 1):
        order = (plain, changed) if number % 2 else (changed, plain)
        seconds = {id(side): side.seconds() for side in order}
        if number:
            ratios.append(seconds[id(changed)] / seconds[id(plain)])
    return Spread.of(ratios)


def kept_bytes(side: Side) -> int:
    """Bytes that a step keeps from its forward pass for the backward pass, without the model's weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in side.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        side.step()
    return sum(kept.values())


def blocks_side(options: Mapping[str, Any], folder: Path) -> Side:
    """A DiT with these options; the loss is the mean square of its prediction. `folder` is not used."""
    torch.manual_seed(0)
    model = build(MODELS, {**BLOCKS_SHAPE, **options})
    size = BLOCKS_SHAPE["input_size"]
    batch = (torch.randn(BATCH, 4, size, size), torch.rand(BATCH) * 1000, torch.arange(BATCH))
    return _with_adamw(model, lambda: model(*batch).square().mean())


def objective_side(options: Sequence[str], folder: Path) -> Side:
    """A flow with these keys of a config, on drawn images. Nothing is written to `folder`."""
    torch.manual_seed(0)
    model = build(MODELS, dict(OBJECTIVE_SHAPE))
    process = RectifiedFlow()
    config = load_config(CONFIG, "train", [*_needed(folder), "diffusion.policy=uniform", *options])
    objective = Objective(_Replica(model), process, build_accelerations(config, model, process))
    shape = (BATCH, 4, OBJECTIVE_SHAPE["input_size"], OBJECTIVE_SHAPE["input_size"])
    given = ModelInputs(torch.randn(shape), torch.randn(shape), torch.arange(BATCH))
    policy = build_policy("uniform", process.schedule, "flow")
    draw = policy.draw(BATCH, generator=torch.Generator().manual_seed(0))
    return _with_adamw(model, lambda: objective.losses(given, draw).loss.mean())


def alignment_side(options: Sequence[str], folder: Path) -> Side:
    """A trainer of digits with these keys of a config."""
    own = (*_needed(folder), "data.batch_size=16", "data.num_workers=0", "device=cpu")
    trainer = build_trainer(load_config(CONFIG, "train", [*ALIGNMENT_MODEL, *own, *options]))
    trainer.engine.model.train()
    return Side(trainer.model, trainer.optimizer_step)


# What can be compared: the rows, and what makes a side of a row's options.
COMPARED: Mapping[str, tuple[Mapping[str, Any], Callable[[Any, Path], Side]]] = {
    "blocks": (BLOCKS, blocks_side),
    "objective": (OBJECTIVES, objective_side),
    "alignment": (ALIGNMENTS, alignment_side),
}


@dataclass
class _Replica:
    """What an objective asks of the trainer's replica."""

    model: nn.Module

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()


def _needed(folder: Path) -> tuple[str, ...]:
    return f"experiment_dir={folder}", "max_training_steps=1000"


def _with_adamw(model: nn.Module, loss: Callable[[], Tensor]) -> Side:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return Side(model, step)


def _print_assignments(rounds: int) -> None:
    """Prints the time of an assignment, with its product, for latents of 4 x 32 x 32 and some batches."""
    print("| samples of a rank | milliseconds of an assignment |\n|---|---|")
    for batch in ASSIGNED:
        x_0, noise = torch.randn(2, batch, 4 * 32 * 32).unbind()
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            assignment(x_0, noise)
            seconds.append(time.perf_counter() - start)
        print(f"| {batch} | {1000 * Spread.of(seconds[1:]).median:.1f} |", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.acceleration_costs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("compared", choices=[*COMPARED, "assignment"], help="what is compared")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of steps that count")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
