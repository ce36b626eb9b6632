"""A file of results, as JSON: a finished training per line, so that a run that was stopped goes on."""

import json
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

Read = TypeVar("Read")


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


def check_exists(path: Path) -> None:
    """Raises ValueError if there is no results file for a report."""
    if not path.is_file():
        raise ValueError(f"--report needs results, and there is no file {path}; wanted the --out of a run")


def append(path: Path, result: Any) -> None:
    """Adds a dataclass as a line. Numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a", encoding="utf-8") as file:
        file.write("\n" * is_torn + json.dumps(_finite(asdict(result)), allow_nan=False) + "\n")


@cache
def revision() -> str:
    """The code's revision as git describes it; "" outside a checkout, and without git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
    return found.stdout.strip()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Prints a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
