"""Measures what an alignment costs: time of a step and weights, beside a step without, interleaved.

    python -m benchmarks.speed.alignment_cost

The model is a DiT of 4 blocks of width 128 on 64 tokens, the batch 16 digits, the process one CPU thread.
Each alignment's step is divided by the plain step before it, `ROUNDS` times. The median is printed with the
quartiles.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

ROUNDS = 7
MODEL = ("model.hidden_size=128", "model.depth=4", "model.num_heads=4", "model.patch_size=1")
REPA = "type: REPA, teacher: embedded, layer: 2"
SECTIONS = {
    "off": "{}",
    "REPA, embedded at 128 pixels": f"{{{REPA}}}",
    "REPA, embedded at 32 pixels": f"{{{REPA}, teacher_size: 32}}",
    "REPA after its end": f"{{{REPA}, until: 1}}",
    "SRA, blocks 1 to 2": "{type: SRA, layer: 1}",
}


def trainer_of(folder: Path, section: str) -> Trainer:
    """A trainer with this alignment, one step old."""
    own = (f"experiment_dir={folder}", "data.batch_size=16", "max_training_steps=1000", "data.num_workers=0")
    config = load_config(
        "configs/image/digits/speedit.yaml", "train", [*MODEL, *own, f"alignment={section}", "device=cpu"]
    )
    trainer = build_trainer(config)
    trainer.engine.model.train()
    trainer.optimizer_step()
    return trainer


def seconds(trainer: Trainer) -> float:
    """Wall-clock time of a step."""
    start = time.perf_counter()
    trainer.optimizer_step()
    return time.perf_counter() - start


def main() -> None:
    """Prints a line for each alignment: trained parameters, and the ratio of its step's time."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: trainer_of(Path(folder) / name, text) for name, text in SECTIONS.items()}
        ratios: dict[str, list[float]] = {name: [] for name in trainers}
        for _ in range(ROUNDS):
            for name, trainer in trainers.items():
                plain = seconds(trainers["off"])
                ratios[name].append(seconds(trainer) / plain)
        for name, trainer in trainers.items():
            low, middle, high = statistics.quantiles(ratios[name], n=4)
            trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
            sys.stdout.write(f"{name}: {middle:.2f} ({low:.2f} to {high:.2f}), {trained:,} trained\n")


if __name__ == "__main__":
    main()
