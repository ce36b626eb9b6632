"""The best checkpoint of a run: which one it is, by what, and how good. `keep_best` asks for it.

checkpoints/best.json has the name of its folder, its step, what was measured, and the value.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from speedit_plugins.files import write_whole
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say

# The value of ckpt_path that means the best checkpoint, and the file that names it.
BEST, FILE = "best", "best.json"


@dataclass(frozen=True)
class Best:
    """The best checkpoint: name of its folder, its step, and the lowest value of `score` so far."""

    checkpoint: str
    step: int
    score: str
    value: float


def is_better(scores: Mapping[str, float], best: Best | None, score: str) -> bool:
    """Whether these scores have a finite value of `score`, and a lower one than the best checkpoint."""
    value = scores.get(score, math.inf)
    return math.isfinite(value) and (best is None or value < best.value)


def kept_names(checkpoints: Path) -> tuple[str, ...]:
    """Name of the folder that best.json names, by whatever score; it stays until another one is named."""
    best = read_best(checkpoints)
    return () if best is None else (best.checkpoint,)


def read_best(checkpoints: Path, score: str | None = None, *, up_to: int | None = None) -> Best | None:
    """The best checkpoint in a run's folder of checkpoints; None if none is noted, or it is gone.

    Args:
        checkpoints: the folder.
        score: what it is the best by; None takes any.
        up_to: last step that counts: a run that goes back to it has not measured later ones. None is no
            limit.

    Raises:
        ValueError: the file is damaged.
    """
    path = checkpoints / FILE
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        best = Best(str(found["checkpoint"]), int(found["step"]), str(found["score"]), float(found["value"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}; delete it") from error
    is_wanted = score in (None, best.score) and (up_to is None or best.step <= up_to)
    return best if is_wanted and (checkpoints / best.checkpoint).is_dir() else None


def note_best(checkpoints: Path, best: Best, runtime: Runtime) -> None:
    """Notes the best checkpoint beside it. Collective.

    Rank 0 writes the file, whole or not at all.

    Args:
        checkpoints: the folder of the run's checkpoints.

    Raises:
        OSError: the file cannot be written. The other ranks raise a ValueError with its text.
    """
    fault: OSError | None = None
    if runtime.is_main:
        try:
            write_whole(checkpoints / FILE, f"{json.dumps(asdict(best), indent=1)}\n".encode())
        except OSError as error:
            fault = error
    runtime.raise_together(fault)
    if runtime.is_main:
        path = checkpoints / best.checkpoint
        say(f"step {best.step} has the lowest {best.score} so far, {best.value:.4f}: {path} is kept")
