"""The folder of an experiment: the names of its files.

`experiment_dir` holds checkpoints/, metrics.jsonl, loss.png, tensorboard/, wandb/, grids/, samples.png (for
videos also samples.mp4 and samples.gif), inference/, test.json, environment.json, the config of each phase
that ran, and train.lock, which names the training that is in it. Tools write timestep_profile.json,
timestep_profile.png and report.html.
"""

from pathlib import Path

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import checkpoint
from speedit_plugins.trainer.config.loading import to_yaml
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.terminal import say

CHECKPOINTS, GRIDS, INFERENCE = "checkpoints", "grids", "inference"
SAMPLES, LOSS_CURVE, TEST, METRICS = "samples.png", "loss.png", "test.json", "metrics.jsonl"
LOCK = "train.lock"
# What inference writes: captions beside the samples, and the suffix of a folder that is not finished.
CAPTIONS, UNFINISHED = "captions.jsonl", ".tmp"


def save_config(config: ExperimentConfig, phase: str) -> None:
    """Writes the resolved config of a phase as config_<phase>.yaml, secrets redacted."""
    folder = Path(config.experiment_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"config_{phase}.yaml", to_yaml(config).encode())


def say_where(folder: Path) -> None:
    """Prints the paths of an experiment's results that exist."""
    places = {
        "sample grid": folder / SAMPLES,
        "as video": (folder / SAMPLES).with_suffix(".mp4"),
        "as GIF": (folder / SAMPLES).with_suffix(".gif"),
        "loss curve": folder / LOSS_CURVE,
        "metrics": folder / METRICS,
        "checkpoint": checkpoint.newest(folder / CHECKPOINTS),
    }
    for name, path in places.items():
        if path is not None and path.exists():
            say(f"  {name:<12} {path}")
