"""Training steps with the measured choice of products, with torch's products, and with oneDNN's.

One trainer per case makes steps with the three in turn. Nothing differs but the choice in the layers. A
ratio is the seconds with torch's products over the seconds with the others, within a round: above 1, the
others are faster. The choice is made several times, and the spread of its single ratios is shown too.

    python -m benchmarks.speed.product_choice [--rounds 9] [--threads 2] [--clock wall] [--only DiT-S/8]
        [--json OUT]
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.speed.throughput import CLOCKS
from benchmarks.speed.training_steps import Case, batch_of, latent_trainer
from benchmarks.spread import Spread, quantiles
from speedit_plugins.trainer.models.layers.linear import Products
from speedit_plugins.trainer.training.products import timing
from speedit_plugins.trainer.training.products.choice import (
    choose_products,
    describe,
    layer_shapes,
    restore_products,
    saved_products,
)
from speedit_plugins.trainer.training.trainer import Trainer

CASES = (
    Case("DiT-S/2", 8, 32),
    Case("DiT-B/4", 4, 32),
    Case("DiT-S/8", 32, 32),
    Case("Latte-S/2", 2, 16, num_frames=8),
)
TORCH, MEASURED, ONEDNN = "torch's", "measured", "oneDNN's"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each case when it is done. With --json it also writes all values."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.clock} time of steps")
    values = {}
    for case in CASES:
        if case.model in arguments.only:
            values[case.model] = measured = measure(case, arguments.rounds, CLOCKS[arguments.clock])
            print(f"\n{case}\n{table(measured)}", flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def measure(
    case: Case, rounds: int, clock: Callable[[], float], *, num_choices: int = 5
) -> Mapping[str, Any]:
    """The choices with their seconds, the ratios of single pairs by shape, and the steps' seconds by side."""
    trainer = latent_trainer(case, *batch_of(case))
    trainer.model.train()
    choices = []
    for _ in range(num_choices):
        start = clock()
        choose_products(trainer.model, trainer.config, trainer.runtime)
        choices.append((describe(trainer.model), clock() - start))
    sides = {
        TORCH: {},
        MEASURED: saved_products(trainer.model),
        ONEDNN: dict.fromkeys(layer_shapes(trainer.model, case.batch), [True] * len(Products._fields)),
    }
    steps: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            taken = _step(trainer, sides[name], clock)
            if number:
                steps[name].append(taken)
    return {
        "choices": choices,
        "ratios": {"x".join(map(str, shape)): product_ratios(shape) for shape in _shapes(trainer, case)},
        "steps": steps,
    }


def product_ratios(shape: tuple[int, int, int], num_pairs: int = 20) -> list[list[float]]:
    """Torch's seconds / oneDNN's for output, gradient by input and by weight, timed as for the choice."""
    found: list[list[float]] = []

    def keep(pairs: Iterator[float]) -> bool:
        found.append(list(pairs))
        return False

    with patch.multiple(timing, NUM_PAIRS=num_pairs, is_clear=keep):
        timing.fastest_products(*shape)
    return found


def table(measured: Mapping[str, Any]) -> str:
    """The choices, a row of deciles for each product, and a row for each side of the steps."""
    steps = measured["steps"]
    lines = [
        *(f"{words} in {took:.2f} s" for words, took in measured["choices"]),
        "| rows x in x out | output: 0.1, 0.5, 0.9 | by input | by weight |",
        "|---|---|---|---|",
    ]
    for shape, of_products in measured["ratios"].items():
        cells = [", ".join(f"{q:.2f}" for q in quantiles(each, (0.1, 0.5, 0.9))) for each in of_products]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    lines += ["| products | step | over torch's (quartiles) |", "|---|---|---|"]
    for name, seconds in steps.items():
        ratio = Spread.of([a / b for a, b in zip(steps[TORCH], seconds, strict=True)])
        step = Spread.of(seconds).median
        lines.append(f"| {name} | {step:.3f} s | {ratio.median:.3f} ({ratio.low:.3f}, {ratio.high:.3f}) |")
    return "\n".join(lines)


def _shapes(trainer: Trainer, case: Case) -> list[tuple[int, int, int]]:
    return sorted(set(layer_shapes(trainer.model, case.batch).values()))


def _step(trainer: Trainer, products: Mapping[str, Sequence[bool]], clock: Callable[[], float]) -> float:
    restore_products(trainer.model, products, trainer.runtime)
    start = clock()
    trainer.optimizer_step()
    return clock() - start


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.product_choice",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=9, help="number of timed steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="clock of the steps; cpu needs one thread"
    )
    models = [case.model for case in CASES]
    parser.add_argument("--only", nargs="+", choices=models, default=models, help="cases to run")
    parser.add_argument("--json", type=Path, help="also write all values here")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error(f"wanted --rounds and --threads >= 1, got {arguments.rounds} and {arguments.threads}")
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error(f"--clock cpu counts waiting threads: wanted --threads 1, got {arguments.threads}")
    return arguments


if __name__ == "__main__":
    main()
