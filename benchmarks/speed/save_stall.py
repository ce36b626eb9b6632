"""How long a training stands still for a checkpoint, and how it steps meanwhile: `async_save` off and on.

    python -m benchmarks.speed.save_stall [--rounds 5] [--steps 8] [--threads 1] [key=value ...]

Two trainers of DiT-S (33 million parameters) on digits take turns. Each makes some steps, saves, goes on
until the checkpoint is whole, and makes some more. The ratio is taken within a round, so that a machine that
others use too slows both sides. The first round does not count: its save uses new memory. Both sides write to
the folder for temporary files.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.spread import Spread
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

CONFIG = "configs/image/digits/speedit.yaml"
# The width, depth and heads of DiT-S, on 16 tokens.
OPTIONS = (
    "model.hidden_size=384",
    "model.depth=12",
    "model.num_heads=6",
    "model.patch_size=2",
    "data.batch_size=4",
    "data.num_workers=0",
    "max_training_steps=100000",
    "keep_last=1",
    "enable_tensorboard_log=false",
    "device=cpu",
)


@dataclass(frozen=True)
class Timed:
    """Seconds of a save, and of the steps around it.

    Args:
        stall: how long the training loop stands still for the save.
        flight: from the beginning of the save until the checkpoint is whole.
        before: of each step before the save.
        during: of each step that was begun before the checkpoint was whole; [] if the training waits for it.
        after: of each step afterwards.
    """

    stall: float
    flight: float
    before: list[float]
    during: list[float]
    after: list[float]

    @property
    def cost(self) -> float:
        """What the save costs in all: the stall, and what the steps during it take longer than before it."""
        usual = Spread.of(self.before).median
        return self.stall + sum(seconds - usual for seconds in self.during)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints stall, steps and cost of both sides, their ratios, and the memory of a save."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        waiting, going_on = (
            _trainer(Path(folder) / name, [*arguments.overrides, f"async_save={name}"])
            for name in ("false", "true")
        )
        count = sum(parameter.numel() for parameter in going_on.model.parameters())
        rounds = []
        for number in range(arguments.rounds + 1):
            sides = (waiting, going_on) if number % 2 else (going_on, waiting)
            memory = resident_bytes()
            found = {id(side): timed(side, arguments.steps) for side in sides}
            rounds.append((found[id(waiting)], found[id(going_on)]))
            if not number:
                print(f"{count:,} parameters; {_files(going_on) / 1e6:,.0f} MB in a checkpoint")
                print(f"first save in the background: stall {rounds[0][1].stall:.2f} s")
                print(f"memory that the first round added: {(resident_bytes() - memory) / 1e6:,.0f} MB")
    print("\n".join(table(rounds[1:])))


def table(rounds: Sequence[tuple[Timed, Timed]]) -> list[str]:
    """Lines of a table: median and quartiles over the rounds, for a save that is waited for and the other."""
    lines = ["| | waits | goes on | ratio |", "|---|---|---|---|"]
    figures: dict[str, Callable[[Timed], float]] = {
        "stall, s": lambda side: side.stall,
        "until the checkpoint is whole, s": lambda side: side.flight,
        "cost of a save in all, s": lambda side: side.cost,
        "step before, s": lambda side: Spread.of(side.before).median,
        "step after, s": lambda side: Spread.of(side.after).median,
    }
    for name, figure in figures.items():
        pairs = [(figure(waits), figure(goes_on)) for waits, goes_on in rounds]
        sides = [_said([pair[side] for pair in pairs]) for side in (0, 1)]
        lines.append(f"| {name} | {sides[0]} | {sides[1]} | {_said([b / a for a, b in pairs])} |")
    during = [side for _, side in rounds if side.during]
    if during:
        steps = [Spread.of(side.during).median for side in during]
        slower = [step / Spread.of(side.before).median for step, side in zip(steps, during, strict=True)]
        lines.append(f"| step during, s | none | {_said(steps)} | {_said(slower)} of a step before |")
    return lines


def timed(trainer: Trainer, num_steps: int) -> Timed:
    """Makes steps, a save, steps until it is whole, and steps."""
    before = [_seconds(trainer.optimizer_step) for _ in range(num_steps)]
    start = time.perf_counter()
    path = trainer.save()
    stall = time.perf_counter() - start
    during = []
    while trainer.saves.last != path:
        during.append(_seconds(trainer.optimizer_step))
    flight = time.perf_counter() - start
    trainer.saves.wait()
    return Timed(stall, flight, before, during, [_seconds(trainer.optimizer_step) for _ in range(num_steps)])


def resident_bytes() -> int:
    """The memory of this process, as Linux counts it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (found,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return 1024 * int(found)


def _trainer(folder: Path, options: Sequence[str]) -> Trainer:
    trainer = build_trainer(load_config(CONFIG, "train", [*OPTIONS, f"experiment_dir={folder}", *options]))
    trainer.engine.model.train()
    # The optimizer's state is made by the first step.
    trainer.optimizer_step()
    return trainer


def _files(trainer: Trainer) -> int:
    return sum(path.stat().st_size for path in trainer.saves.folder.glob("step_*/*"))


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _said(values: Sequence[float]) -> str:
    spread = Spread.of(values)
    return f"{spread.median:.3f} ({spread.low:.3f} to {spread.high:.3f})"


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.save_stall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="before and after each save")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a key of the config")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
