"""The results file of `benchmarks.gpu`: a line for each thing that was found, written at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.results_file import append, read_lines

RUN, BEGIN, FOUND, END = "run", "begin", "found", "end"
DONE = "done"


@dataclass(frozen=True)
class Line:
    """A line: of the whole run, of the begin or end of a part, or of what a part found.

    Args:
        part: its name; "" in the line of the run.
        kind: RUN, BEGIN, FOUND or END.
        text: Markdown of what was found; the last lines that a part printed, in its end.
        values: numbers and names behind the text. An end has `outcome` and `seconds`, a begin `limit`.
    """

    part: str
    kind: str
    text: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)


def write(folder: Path, line: Line) -> None:
    """Adds the line to the results of a run's folder."""
    append(folder / "results.jsonl", line)


def read(folder: Path) -> list[Line]:
    """The lines of a run's folder. A last line that was cut off is skipped."""
    return read_lines(folder / "results.jsonl", Line, "benchmarks/gpu")


def outcomes(lines: Sequence[Line]) -> dict[str, str]:
    """The outcome of each part of the run, by name: DONE, what went wrong, or that it never ended."""
    found = {name: "not begun" for line in lines if line.kind == RUN for name in line.values["parts"]}
    found |= {line.part: "cut off with the run" for line in lines if line.kind == BEGIN}
    return found | {line.part: line.values["outcome"] for line in lines if line.kind == END}
