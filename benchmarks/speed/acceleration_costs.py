"""What an acceleration costs: training steps with it and without, in turn, in one run.

A step is noising, forward, loss, backward and AdamW, on a fixed batch. The ratio is taken within a round, so
that a machine that others use too slows both sides. Memory is what the losses of one step keep for the
backward pass. Then the time that the assignment of noise takes for a batch, with its product.

    python -m benchmarks.speed.acceleration_costs [--rounds 9] [--threads 1] [--only TEXT]
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks.speed.step_costs import kept_bytes, time_ratio
from benchmarks.spread import Spread
from speedit_plugins.policies.build import build_policy
from speedit_plugins.registry import MODELS, build
from speedit_plugins.trainer.accelerations.build import build_accelerations
from speedit_plugins.trainer.accelerations.noise_assignment import assignment
from speedit_plugins.trainer.accelerations.objective import Objective
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.diffusion.flow import RectifiedFlow
from speedit_plugins.trainer.inputs import ModelInputs

# 256 tokens, as latents of a 256 x 256 image have, and as many blocks as DiT-B.
SHAPE: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "hidden_size": 192,
    "depth": 12,
    "num_heads": 3,
    "num_classes": 10,
    "class_dropout_prob": 0.0,
    "learn_sigma": False,
}
BATCH = 8
CASES: dict[str, Sequence[str]] = {
    "routing: {keep: 0.5}": ("routing.keep=0.5",),
    "routing: {keep: 0.25}": ("routing.keep=0.25",),
    "noise_assignment: batch": ("noise_assignment=batch",),
    "uncertainty: true": ("uncertainty=true",),
    "contrastive: {weight: 0.05}": ("contrastive.weight=0.05",),
    "nothing": (),
}


class Side:
    """A training on one fixed batch."""

    def __init__(self, options: Sequence[str]) -> None:
        torch.manual_seed(0)
        self.model = build(MODELS, {"type": "DiT", **SHAPE})
        process = RectifiedFlow()
        needed = ("experiment_dir=unused", "max_training_steps=1", "diffusion.policy=uniform")
        config = load_config("configs/image/digits/speedit.yaml", "train", [*needed, *options])
        self.objective = Objective(self, process, build_accelerations(config, self.model, process))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.given = ModelInputs(
            torch.randn(BATCH, 4, 32, 32), torch.randn(BATCH, 4, 32, 32), torch.arange(BATCH)
        )
        policy = build_policy("uniform", process.schedule, "flow")
        self.draw = policy.draw(BATCH, generator=torch.Generator().manual_seed(0))

    def autocast(self) -> Any:
        """Nothing."""
        return nullcontext()

    def step(self) -> float:
        """Makes a step and returns its seconds."""
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def loss(self) -> Tensor:
        """The mean loss of the batch."""
        return self.objective.losses(self.given, self.draw).loss.mean()


def main() -> None:
    """Prints a row for each acceleration, then one for each batch of the assignment."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.acceleration_costs", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="accelerations whose name has this in it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| acceleration | time of a step | kept memory |\n|---|---|---|")
    for name, options in CASES.items():
        if arguments.only not in name:
            continue
        plain, changed = Side(()), Side(options)
        spread = time_ratio(plain, changed, arguments.rounds)
        memory = kept_bytes(changed.model, changed.loss) / kept_bytes(plain.model, plain.loss)
        print(
            f"| `{name}` | {spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f}) | {memory:.2f} |",
            flush=True,
        )
    print_assignments(arguments.rounds)


def print_assignments(rounds: int) -> None:
    """Prints the time of an assignment for different batches."""
    print("\n| samples of a rank | milliseconds of an assignment |\n|---|---|")
    for batch in (8, 32, 128, 512):
        x_0, noise = torch.randn(2, batch, 4 * 32 * 32).unbind()
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            assignment(x_0, noise)
            seconds.append(time.perf_counter() - start)
        print(f"| {batch} | {1000 * Spread.of(seconds[1:]).median:.1f} |", flush=True)


if __name__ == "__main__":
    main()
