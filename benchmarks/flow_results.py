"""The results file of benchmarks/flow.py: one finished training per line, as JSON."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Read = TypeVar("Read")

# Seeds from here on choose laws; those below report on them.
FIRST_SELECTION_SEED = 100


@dataclass(frozen=True)
class Result:
    """One training.

    Args:
        data: name of the data set.
        law: name of the law.
        seed: of the training.
        policy: what `build_policy` got.
        options: all else that decides the curve; `steps` are those of the evaluations.
        distances: sampler -> space -> squared Fréchet distance at each evaluation.
        seconds: of wall clock, with evaluations.
        facts: of the data set: `centre` of its spectrum, `floor` of each distance, and its size.
        revision: of the code.
    """

    data: str
    law: str
    seed: int
    policy: Mapping[str, Any]
    options: Mapping[str, Any]
    distances: Mapping[str, Mapping[str, list[float]]]
    seconds: float
    facts: Mapping[str, Any]
    revision: str

    @property
    def key(self) -> str:
        """Equal for results that a resumed run need not make again."""
        return json.dumps([self.data, self.law, self.seed, self.policy, self.options], sort_keys=True)

    @property
    def chooses(self) -> bool:
        """Whether the seed is one that chooses laws."""
        return self.seed >= FIRST_SELECTION_SEED


def read_results(path: Path) -> list[Result]:
    """The results so far; see `read_lines`."""
    return read_lines(path, Result, "flow.py")


def read_lines(path: Path, kind: Callable[..., Read], source: str) -> list[Read]:
    """The lines of a results file, [] without a file. A last line that a killed run left is skipped.

    Args:
        path: of the file.
        kind: makes a result of the keys of a line.
        source: what wrote the file, for the message.

    Raises:
        ValueError: another line is not a result of the source.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                found.append(kind(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, needs a result of {source}: {error}") from error
    return found


def append(path: Path, result: Any) -> None:
    """Adds a dataclass as a line. Numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + json.dumps(_finite(asdict(result)), allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
