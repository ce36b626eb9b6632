"""Names of the folders of checkpoints: the step in them, and the newest."""

import re
from pathlib import Path

from speedit_plugins.trainer.checkpoints.contents import CheckpointError

_NAME = re.compile(r"step_(\d{7,})")


def folder_name(step: int) -> str:
    """The name of the folder with the checkpoint of a step."""
    return f"step_{step:07d}"


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`; None if there is none."""
    found = newest_first(folder)
    return found[0] if found else None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the highest step first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    step = step_in_name(path)
    if step is None:
        raise CheckpointError(f"a checkpoint folder is named step_<number>, got {path}")
    return step


def step_in_name(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for a folder of another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None
