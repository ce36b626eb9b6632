"""Where a training leaves its config: in each checkpoint, and in the folder of its run."""

from pathlib import Path

# In a checkpoint, and in a run; the folders of a run with checkpoints, and with averages made afterwards.
CONFIG, RUN_CONFIG, CHECKPOINTS, POSTHOC = "config.yaml", "config_train.yaml", "checkpoints", "posthoc"


def config_of(source: Path) -> Path | None:
    """The config of the training that wrote weights; None where none is beside them.

    Args:
        source: a checkpoint's folder, or a file of weights.
    """
    folder = source if source.is_dir() else source.parent
    found = folder.parent / RUN_CONFIG if folder.name == POSTHOC else folder / CONFIG
    return found if found.is_file() else None


def named_config(source: Path) -> Path | None:
    """As `config_of`, for a message: the run's own config if it is there, because its path is short."""
    found = config_of(source)
    if found is None or found.parent.parent.name != CHECKPOINTS:
        return found
    of_run = found.parent.parent.parent / RUN_CONFIG
    return of_run if of_run.is_file() else found
