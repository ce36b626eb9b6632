"""The folder of an experiment: the names of its files.

`experiment_dir` holds checkpoints/, metrics.jsonl, loss.png, tensorboard/, wandb/, grids/, samples.png (for
videos also samples.mp4 and samples.gif, for shapes samples.gif and samples/), inference/, test.json,
environment.json, the statistics of a reference, the config of each phase that ran, and train.lock, which
names the training that is in it. Tools write timestep_profile.json, timestep_profile.png and report.html.
Nothing is written over that a person may want: the next grid is samples_0001.png, and an earlier test.json
becomes test_0001.json.
"""

import re
import shutil
from pathlib import Path

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import checkpoints, saved_configs
from speedit_plugins.trainer.config.loading import to_yaml
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.terminal import say

_NUMBER = re.compile(r".+_(\d{4,})")
CHECKPOINTS, GRIDS, INFERENCE = saved_configs.CHECKPOINTS, "grids", "inference"
SAMPLES, LOSS_CURVE, TEST, METRICS = "samples.png", "loss.png", "test.json", "metrics.jsonl"
LOCK = "train.lock"
# What inference writes beside the samples: captions, classes, and items of the data. An unfinished folder has
# the suffix UNFINISHED.
CAPTIONS, LABELS, ITEMS, UNFINISHED = "captions.jsonl", "labels.jsonl", "items.jsonl", ".tmp"
# Ends of the names of two more folders: samples with holes, and samples of a cascade's stages.
MASKED, STAGES = "masked", "stages"


def save_config(config: ExperimentConfig, phase: str) -> None:
    """Writes the resolved config of a phase as config_<phase>.yaml, secrets redacted."""
    folder = Path(config.experiment_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"config_{phase}.yaml", to_yaml(config).encode())


def inferences(folder: Path) -> list[Path]:
    """The finished sets of samples in a folder of inferences, by name, without `_masked` and `_stages`.

    Videos and shapes are in a folder. Images are in a folder and in an npz.
    """
    beside = (UNFINISHED, f"_{MASKED}", f"_{STAGES}")
    found = (path for path in folder.glob("*") if path.is_dir() or path.suffix == ".npz")
    return sorted(path for path in found if not path.name.endswith(beside))


def newest_samples(config: ExperimentConfig) -> Path:
    """The newest finished samples in `experiment_dir`: the npz of images, the folder of videos or shapes.

    Raises:
        ValueError: there are none.
    """
    folder = Path(config.experiment_dir) / INFERENCE
    what = "shapes" if config.voxel_size else "videos" if config.num_frames else "npz"
    found = [path for path in inferences(folder) if (path.suffix == ".npz") == (what == "npz")]
    if not found:
        raise ValueError(f"no {what} in {folder}: run the phase inference first, or give samples")
    return max(found, key=lambda path: path.stat().st_mtime)


def numbered(path: Path) -> list[Path]:
    """The path, and those that `free_path` has given instead of it, that exist: the oldest first."""
    found = path.parent.glob(f"{path.stem}_[0-9]*{path.suffix}")
    later = [(int(match[1]), each) for each in found if (match := _NUMBER.fullmatch(each.stem))]
    return [*([path] if path.exists() else []), *(each for _, each in sorted(later))]


def free_path(path: Path) -> Path:
    """The path if nothing is there, else NAME_0001, NAME_0002, ..., so that nothing is written over.

    A file of the same name with another suffix counts too: the videos beside a picture.
    """
    taken = [path.stem, *(each.stem for each in path.parent.glob(f"{path.stem}_[0-9]*"))]
    numbers = [int(match[1]) for stem in taken if (match := _NUMBER.fullmatch(stem))]
    if not numbers and not any(path.parent.glob(f"{path.stem}.*")):
        return path
    return path.with_stem(f"{path.stem}_{max(numbers, default=0) + 1:04d}")


def keep_earlier(path: Path) -> None:
    """Copies a file to the next free name, and says so, before another takes its place."""
    if path.exists():
        earlier = free_path(path)
        shutil.copy2(path, earlier)
        say(f"the earlier {path.name} is kept as {earlier}")


def say_where(folder: Path, *, samples: Path | None = None) -> None:
    """Prints the paths of an experiment's results that exist.

    Args:
        samples: the sample grid; None is the newest one.
    """
    grid = samples or next(reversed(numbered(folder / SAMPLES)), folder / SAMPLES)
    places = {
        "sample grid": grid,
        "as video": grid.with_suffix(".mp4"),
        "as GIF": grid.with_suffix(".gif"),
        "as models": grid.with_suffix(""),
        "loss curve": folder / LOSS_CURVE,
        "metrics": folder / METRICS,
        "checkpoint": checkpoints.newest(folder / CHECKPOINTS),
    }
    for name, path in places.items():
        if path is not None and path.exists():
            say(f"  {name:<12} {path}")
