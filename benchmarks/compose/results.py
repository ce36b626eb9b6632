"""The results file of benchmarks/compose: a finished training or a pace per line, as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.results_file import read_lines


@dataclass(frozen=True)
class Training:
    """One training.

    Args:
        data: name of the data set.
        process: `flow` or `epsilon`.
        arm: name of the arm.
        seed: of the training.
        config: its keys, without the seed.
        options: what all arms share.
        steps: at which the distances were measured.
        distances: space -> squared Fréchet distance at each of them; None where it is not finite.
        seconds, cpu_seconds: of training up to each of them, without evaluation.
        setup_seconds: until the first step.
        total_seconds: with evaluation.
        num_parameters: that are trained, with those that only the training needs.
        num_samples: of the data set.
        floor: distances of as many samples of the data.
        revision: of the code.
        centre: log-SNR by which the policy was placed; None for a policy without one.
    """

    data: str
    process: str
    arm: str
    seed: int
    config: Mapping[str, Any]
    options: Mapping[str, Any]
    steps: Sequence[int] = ()
    distances: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    seconds: Sequence[float] = ()
    cpu_seconds: Sequence[float] = ()
    setup_seconds: float = 0.0
    total_seconds: float = 0.0
    num_parameters: int = 0
    num_samples: int = 0
    floor: Mapping[str, float] = field(default_factory=dict)
    revision: str = ""
    centre: float | None = None

    def with_results(self, **found: Any) -> "Training":
        """The same training with what came out of it."""
        return replace(self, **found)

    @property
    def key(self) -> str:
        """Equal for trainings that a resumed run need not make again."""
        return _text([self.data, self.process, self.arm, self.seed, self.config, self.options])

    @property
    def group(self) -> str:
        """Equal for trainings that may be compared with each other."""
        return _text([self.data, self.process, self.options])


@dataclass(frozen=True)
class Pace:
    """Seconds of a step of an arm over the base's, taken in turn in one process.

    Args:
        data, process, arm: as in `Training`.
        config: its keys, without the seed.
        early: median ratio at the start of a training.
        late: median ratio at its end; another one for an acceleration that goes off.
        spread: quartiles of `early`.
        until: share of the horizon after which `late` holds.
        base_seconds: median seconds of a step of the base.
        revision: of the code.
    """

    data: str
    process: str
    arm: str
    config: Mapping[str, Any]
    early: float
    late: float
    spread: Sequence[float]
    until: float
    base_seconds: float
    revision: str

    def seconds(self, steps: float, horizon: int) -> float:
        """Duration of so many steps, in steps of the base."""
        first = min(steps, self.until * horizon)
        return self.early * first + self.late * (steps - first)


def read_trainings(path: Path) -> list[Training]:
    """The trainings so far, [] without a file; see `results_file.read_lines`."""
    return read_lines(path, Training, "benchmarks/compose")


def read_paces(path: Path) -> list[Pace]:
    """The paces so far, [] without a file; see `results_file.read_lines`."""
    return read_lines(path, Pace, "benchmarks/compose --pace")


def pace_file(path: Path) -> Path:
    """The file of paces beside a file of trainings."""
    return path.with_name(f"{path.stem}_pace{path.suffix}")


def _text(parts: Sequence[Any]) -> str:
    return json.dumps(parts, sort_keys=True)
