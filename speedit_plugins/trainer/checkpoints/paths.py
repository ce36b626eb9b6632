"""What a path to a checkpoint means: a file, a checkpoint's folder, or the folder of a run with several."""

import re
from collections.abc import Callable
from pathlib import Path

from speedit_plugins.trainer.checkpoints.contents import MANIFEST
from speedit_plugins.trainer.checkpoints.names import newest_first, step_of
from speedit_plugins.trainer.saved_configs import CHECKPOINTS

_NAMED_STEP = re.compile(r"(?:step_)?0*(\d+)")
_MAX_STEPS = 12


def named_checkpoint(
    path: str | Path, key: str, *, run: Path | None = None, say: Callable[[str], object] | None = None
) -> Path:
    """The file or the checkpoint's folder that a path means.

    The folder of a run, or its checkpoints/, means its newest checkpoint.

    Args:
        path: as the config has it.
        key: key of the config, for messages.
        run: folder of the run whose checkpoints a bare name such as step_0005000 may mean.
        say: prints a line if the path means something below it; None prints nothing.

    Raises:
        ValueError: there is nothing at the path, but checkpoints of other steps beside it, which the message
            lists; or a folder that is neither a checkpoint nor a run. A path without checkpoints beside it is
            returned as it is, for the caller to refuse.
    """
    path = Path(path)
    if path.is_file() or (path / MANIFEST).is_file():
        return path
    if path.is_dir():
        if not (found := _checkpoints_of(path)):
            return path
        if say is not None:
            say(f"{key}: {path} has {_steps(found)}; the newest is taken, {found[0]}")
        return found[0]
    beside = _checkpoints_of(path.parent)
    if not beside and run is not None and len(path.parts) == 1:
        beside = _checkpoints_of(run)
    if beside:
        raise ValueError(
            f"{key} needs a checkpoint, got no {path}{_same_step(path, beside)}; {beside[0].parent} has"
            f" {_steps(beside)}"
        )
    return path


def _checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, or in its checkpoints/, the newest first."""
    return newest_first(folder / CHECKPOINTS) or newest_first(folder)


def _steps(found: list[Path]) -> str:
    numbers = [str(step_of(path)) for path in found[:_MAX_STEPS]]
    older = f" and {len(found) - _MAX_STEPS} older ones" if len(found) > _MAX_STEPS else ""
    return f"step{'s' if len(found) > 1 else ''} {', '.join(reversed(numbers))}{older}"


def _same_step(path: Path, found: list[Path]) -> str:
    """The hint with the checkpoint of the step that a name means, such as step_5000 for step_0005000."""
    match = _NAMED_STEP.fullmatch(path.name)
    same = [each for each in found if match and step_of(each) == int(match[1])]
    return f"; did you mean {same[0]}?" if same else ""
