"""The command line that benchmarks of many trainings share."""

import argparse
from pathlib import Path


def training_parser(
    name: str, about: str | None, *, horizon: int, lr: float, num_samples: int
) -> argparse.ArgumentParser:
    """A parser with the options of every training; the program adds what is to be trained.

    Args:
        name: of the program in `benchmarks`, and of its folder in `outputs`.
        about: the program's text.
        horizon, lr, num_samples: what the options have if they are not given.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, results = parser.add_argument, Path("outputs", name, "results.jsonl")
    add("--out", type=Path, default=results, help="results; lines are appended")
    add("--report", action="store_true", help="print what the results say, and train nothing")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="all of a seed before the next seed")
    add("--horizon", type=int, default=horizon, help="steps of a training")
    add("--lr", type=float, default=lr, help="learning rate of AdamW")
    add("--num-samples", type=int, default=num_samples, help="of each measure")
    add("--threads", type=int, default=1, help="of the CPU, for each training")
    add("--hours", type=float, default=float("inf"), help="begin no training after so many hours")
    return parser
