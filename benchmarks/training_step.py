"""Time of a DiT training step, ours against facebookresearch/DiT, interleaved in one run.

A step is forward, mean squared error, backward and AdamW. Each round times both models, in alternating order,
so that a slow moment of the machine meets both; medians are compared.

    python benchmarks/training_step.py --hosts DIR [--rounds 9] [--threads 2] [--clock wall] [--json OUT]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from original_dit import load_original
from torch import nn

from speedit_plugins.models import dit  # noqa: F401 - registers the models
from speedit_plugins.registry import MODELS, build

# Processor time is not stretched by other programs, but counts threads that wait: for one thread.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# Name, batch, edge of the input.
CASES = (("DiT-S/2", 8, 32), ("DiT-S/8", 32, 32))


@dataclass(frozen=True)
class Timing:
    """Medians of one case, in seconds, and the ratios ours / original (below 1: ours is faster).

    `round_quartiles` are those of the ratio within a round: how far the machine's noise reaches.
    """

    model: str
    batch: int
    rounds: int
    ours_seconds: float
    original_seconds: float
    step_ratio: float
    forward_backward_ratio: float
    round_quartiles: tuple[float, float]


def main() -> None:
    """Prints one line per case and, where asked, writes the timings as JSON."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    original = load_original(arguments.hosts)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.clock} time, "
        f"{arguments.rounds} rounds per model"
    )
    timings = []
    for name, batch, edge in CASES:
        timing = compare(
            original, name, batch=batch, edge=edge, rounds=arguments.rounds, clock=CLOCKS[arguments.clock]
        )
        timings.append(timing)
        print(
            f"{name} batch {batch}, {edge} x {edge}: ours {timing.ours_seconds:.3f} s, original "
            f"{timing.original_seconds:.3f} s, ratio {timing.step_ratio:.3f} "
            f"(quartiles of a round {timing.round_quartiles[0]:.3f}, {timing.round_quartiles[1]:.3f}; "
            f"forward and backward alone {timing.forward_backward_ratio:.3f})"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(timing) for timing in timings], indent=2) + "\n")


def compare(
    original: ModuleType,
    name: str,
    *,
    batch: int,
    edge: int,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Times both models on the same weights and inputs, after one warm-up step each."""
    torch.manual_seed(0)
    ours = build(MODELS, {"type": name, "input_size": edge})
    theirs = original.DiT_models[name](input_size=edge)
    # Random weights in place of the zeros of the start: no operation sees a special value.
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.02)
    theirs.load_state_dict(ours.state_dict())
    batch_data = (
        torch.randn(batch, 4, edge, edge),
        torch.randint(0, 1000, (batch,)),
        torch.randint(0, 1000, (batch,)),
        torch.randn(batch, 8, edge, edge),
    )
    steps = {"ours": _stepper(ours, batch_data, clock), "original": _stepper(theirs, batch_data, clock)}
    seconds: dict[str, list[tuple[float, float]]] = {key: [] for key in steps}
    for index in range(rounds + 1):
        for key in sorted(steps, reverse=index % 2 == 1):
            measured = steps[key]()
            if index > 0:
                seconds[key].append(measured)
    whole = {key: statistics.median(sum(pair) for pair in pairs) for key, pairs in seconds.items()}
    rounds_ratio = [sum(a) / sum(b) for a, b in zip(seconds["ours"], seconds["original"], strict=True)]
    gradient = {key: statistics.median(pair[0] for pair in pairs) for key, pairs in seconds.items()}
    return Timing(
        model=name,
        batch=batch,
        rounds=rounds,
        ours_seconds=whole["ours"],
        original_seconds=whole["original"],
        step_ratio=whole["ours"] / whole["original"],
        forward_backward_ratio=gradient["ours"] / gradient["original"],
        round_quartiles=_quartiles(rounds_ratio),
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    """First and third quartile, interpolated between the values."""
    ordered = torch.tensor(values, dtype=torch.float64)
    low, high = torch.quantile(ordered, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()
    return low, high


def _stepper(
    model: nn.Module, batch: tuple[Any, ...], clock: Callable[[], float]
) -> Callable[[], tuple[float, float]]:
    """One training step as a call that returns the seconds of (forward and backward, optimizer)."""
    x, timestep, label, target = batch
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    def step() -> tuple[float, float]:
        start = clock()
        F.mse_loss(model(x, timestep, label), target).backward()
        middle = clock()
        optimizer.step()
        optimizer.zero_grad()
        return middle - start, clock() - middle

    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=Path, required=True, help="folder that holds facebookresearch+DiT")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: for --threads 1")
    parser.add_argument("--json", type=Path, default=None, help="also write the timings here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
