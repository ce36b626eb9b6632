"""What each option of a DiT's blocks costs: training steps in turn with those of the plain model, in one run.

A step is forward, backward and AdamW, on a fixed batch. The ratio is taken within a round, so that a machine
that others use too slows both sides. Memory is what the backward pass keeps of one forward pass.

    python -m benchmarks.speed.block_costs [--rounds 15] [--threads 1]
"""

import argparse
import time
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.speed.step_costs import kept_bytes, time_ratio
from speedit_plugins.registry import MODELS, build

# 256 tokens of width 256, as latents of a 256 x 256 image have.
SHAPE: dict[str, Any] = {
    "input_size": 32,
    "patch_size": 2,
    "hidden_size": 256,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
    "class_dropout_prob": 0.0,
}
BATCH = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "norm: rms": {"norm": "rms"},
    "norm: rms, qk_norm: true": {"norm": "rms", "qk_norm": True},
    "rope: true": {"rope": True},
    "perceptron: swiglu": {"perceptron": "swiglu"},
    "all four": {"norm": "rms", "qk_norm": True, "rope": True, "perceptron": "swiglu"},
    "all but qk_norm": {"norm": "rms", "rope": True, "perceptron": "swiglu"},
}


@dataclass
class Side:
    """A model in training, with its seconds for each round."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def of(cls, **options: Any) -> "Side":
        """A new model; every side has the same batch."""
        torch.manual_seed(0)
        model = build(MODELS, {"type": "DiT", **SHAPE, **options})
        batch = (torch.randn(BATCH, 4, 32, 32), torch.rand(BATCH) * 1000, torch.arange(BATCH))
        return cls(model, torch.optim.AdamW(model.parameters(), fused=True), batch)

    def step(self) -> float:
        """Makes a step and returns its seconds."""
        start = time.perf_counter()
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def loss(self) -> Tensor:
        """The mean square of the batch's prediction."""
        return cast(Tensor, self.model(*self.batch)).square().mean()


def main() -> None:
    """Prints a row for each option: ratio of time with its quartiles, of memory, and of trained weights."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plain = Side.of()
    print("| option | time of a step | kept memory | trained weights |\n|---|---|---|---|")
    for name, options in OPTIONS.items():
        changed = Side.of(**options)
        spread = time_ratio(plain, changed, arguments.rounds)
        memory = kept_bytes(changed.model, changed.loss) / kept_bytes(plain.model, plain.loss)
        weights = _trained(changed.model) / _trained(plain.model)
        print(
            f"| `{name}` | {spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"
            f" | {memory:.2f} | {weights:.3f} |",
            flush=True,
        )


def _trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


if __name__ == "__main__":
    main()
