"""The results file of benchmarks/flow: one finished training per line, as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results_file import read_lines

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
    """The results so far; see `results_file.read_lines`."""
    return read_lines(path, Result, "benchmarks/flow")
