"""The checks of a training in five runs whose script makes its loss itself.

    long      the policy whose law and weights are checked
    uniform   the policy `uniform`
    plain     the script without the plugin
    first     the policy with its state in a file
    second    the host's own resume of `first`, with that state

Dims: B batch, T timesteps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.recording import Record
from whole_trainings.runs import Run


@dataclass(frozen=True)
class Law:
    """What the long run draws by.

    Args:
        policy: its name.
        schedule: of the host.
        prediction_type: of the host.
        index_of: turns the t that the model saw into the policy's index.
    """

    policy: str
    schedule: Callable[[], NoiseSchedule]
    prediction_type: str
    index_of: Callable[[Tensor], Tensor]

    def checks(self, record: Record) -> tuple[Check, Check]:
        """Law and loss."""
        policy = build_policy(self.policy, self.schedule(), self.prediction_type)
        density, index = policy.density_for(64), [self.index_of(t) for t in record.t]
        seen = [(each + 0.5) / len(density) for each in index]
        law = checks.law(density.view(10, -1).sum(1), seen)
        return law, checks.loss(policy.weight, [record], self.index_of)


@dataclass
class Training:
    """The runs of a host, and how to read what they left.

    Args:
        name: of the host.
        runs: by the names above.
        law: of the long run.
        weights: returns what a run saved last.
        resumed: words in the output of `second` that say that the host took its checkpoint over.
        pictures: returns the folder of a run's samples.
        notes: more stand-ins.
        sampled: the runs with these, with the plugin and without; they trained alike.
    """

    name: str
    runs: dict[str, Run]
    law: Law
    weights: Callable[[str], dict[str, Tensor]]
    resumed: str
    pictures: Callable[[str], Path] | None = None
    notes: Sequence[str] = field(default_factory=list)
    sampled: tuple[str, str] = ("uniform", "plain")

    def result(self) -> Result:
        """All checks."""
        runs = self.runs
        result = Result(self.name, seconds=sum(run.seconds for run in runs.values()))
        result.stand_ins = [*_record(runs["long"]).stand_ins, *self.notes]
        result.commands = [f"{run.script} {' '.join(run.arguments)}" for run in runs.values()]
        bad = [f"{name} {run.exit_code}: {run.last_words()}" for name, run in runs.items() if run.exit_code]
        result.checks["exit"] = Check(not bad, "; ".join(bad) or f"0 in {len(runs)} runs")
        result.checks["law"], result.checks["loss"] = self.law.checks(_record(runs["long"]))
        result.checks["uniform"] = self._uniform()
        if self.pictures is not None:
            result.checks["sampling"] = same_pictures(*map(self.pictures, self.sampled))
        result.checks["resume"] = self._resume()
        return result

    def _uniform(self) -> Check:
        found = checks.same_steps(_record(self.runs["uniform"]), _record(self.runs["plain"]))
        if not found.holds:
            return found
        pair = [self.weights(name) for name in ("uniform", "plain")]
        equal = checks.same_tensors(*pair) and bool(pair[0])
        return Check(equal, f"{found.words}; equal checkpoints: {equal}")

    def _resume(self) -> Check:
        first, second = (_record(self.runs[name]).t for name in ("first", "second"))
        parts, whole = [*first, *second], _record(self.runs["long"]).t
        equal = bool(first and second) and all(map(torch.equal, parts, whole[: len(parts)]))
        took_over = self.runs["second"].said(self.resumed)
        words = f"{len(first)} and {len(second)} steps: "
        words += "the t of one run" if equal else "not the t of one run"
        return Check(equal and took_over, words if took_over else f"{words}; the host did not resume")


def same_pictures(ours: Path, hosts: Path) -> Check:
    """Whether two folders have the same PNG files, whatever their names."""
    pair: list[list[bytes]] = [
        [file.read_bytes() for file in sorted(each.glob("*.png"))] for each in (ours, hosts)
    ]
    if not pair[1]:
        return Check(False, "the host sampled nothing")
    equal = pair[0] == pair[1]
    words = "equal to the bit" if equal else "they differ"
    return Check(equal, f"{len(pair[1])} pictures by the host's sampling, {words}")


def _record(run: Run) -> Record:
    return run.records[0] if run.records else Record()
