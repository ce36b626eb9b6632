"""Training steps of this revision of the trainer against an earlier one, in turn in one run.

Two worker processes, one per revision, build the same experiment. The parent lets one at a time make steps
and compares medians. The whole step counts: data, draw, forward, backward, optimizer and average.

    git worktree add /tmp/before REVISION
    python -m benchmarks.speed.against_revision --before /tmp/before [--rounds 15] [--steps 20]
        [key=value ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.spread import Spread

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "configs/image/digits/speedit.yaml"

# Runs in both revisions, so it uses only names that both have.
WORKER = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[2]))
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.training.assembly import build_trainer
trainer = build_trainer(load_config(sys.argv[1], "train", sys.argv[3:]))
trainer.model.train()
for line in sys.stdin:
    start = time.perf_counter()
    for _ in range(int(line)):
        trainer.optimizer_step()
    print(time.perf_counter() - start, flush=True)
"""


def main() -> None:
    """Prints the median seconds per step of both, and the ratio within a round with its quartiles."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"experiment_dir={folder}", "max_training_steps=1000000", *arguments.overrides]
        workers = {
            name: _worker(root, arguments.threads, overrides)
            for name, root in (("now", ROOT), ("before", arguments.before))
        }
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(arguments.rounds + 1):
            for name in sorted(workers, reverse=number % 2 == 1):
                taken = _steps(workers[name], arguments.steps)
                if number:
                    seconds[name].append(taken / arguments.steps)
        for worker in workers.values():
            worker.stdin.close()  # type: ignore[union-attr]  # opened as a pipe
            worker.wait()
    ratios = [now / before for now, before in zip(seconds["now"], seconds["before"], strict=True)]
    ratio = Spread.of(ratios)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"seconds per step: now {medians['now']:.4f}, before {medians['before']:.4f};"
        f" ratio {ratio.median:.4f} (quartiles {ratio.low:.4f}, {ratio.high:.4f}), below 1: now is faster"
    )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"seconds": seconds, "ratios": ratios}, indent=1) + "\n")


def _worker(root: Path, threads: int, overrides: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, CONFIG, str(threads), *overrides],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        # The revision's package comes before an installed one of the same name.
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)},
    )


def _steps(worker: subprocess.Popen[str], count: int) -> float:
    """Seconds that the worker takes for `count` steps."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(f"{count}\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with code {worker.wait()}")
    return float(line)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.against_revision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier revision")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="per round and revision")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    return parser.parse_args()


if __name__ == "__main__":
    main()
