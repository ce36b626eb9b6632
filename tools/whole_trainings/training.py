"""The whole training of a host by one script on one process; a subclass says how the script is started."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from whole_trainings import checks
from whole_trainings.checks import Check, Result
from whole_trainings.recording import Record
from whole_trainings.runs import Run, Script

POLICY = "speedit"


@dataclass(frozen=True)
class Part:
    """One training.

    Args:
        name: of the run, and of the folder for its results.
        epochs: at whose end it ends, counted from the start of the first part.
        resumed: name of the part whose checkpoint, after one epoch, it goes on from; "" for none.
    """

    name: str
    epochs: int
    resumed: str = ""


class Training:
    """A host. What is named here, a subclass sets; `prepare`, `arguments` and `checkpoint` it defines.

    Attributes:
        name, folder: as the table and the checkout are called.
        model: class name of the model.
        factories: (module, function) pairs that make the object that trains.
        schedule: makes the noise schedule of the policy.
        script: path of the training script in the checkout.
        sampler: path of the host's sampling script.
        steps_per_epoch, num_epochs, batch: of the longest run.
        options: further arguments of `Script`.
        calls_per_step: how often a step asks the model at one t.
        replays: whether the run without the plugin gets the t of `uniform`. A flow keeps its own.
        keeps_state: whether the host's checkpoint keeps the policy's state; else --state does.
        says_resumed: what the host reports when it has read a checkpoint.
        no_resume: why the host cannot go on from a checkpoint; "" if it can.
        samples: names of the two runs whose samples are compared.
    """

    name: str
    folder: str
    model: str
    factories: tuple[tuple[str, str], ...] = ()
    schedule: Callable[[], NoiseSchedule] = NoiseSchedule.linear
    script = "train.py"
    sampler = "sample.py"
    steps_per_epoch, num_epochs, batch = 5, 8, 32
    options: Mapping[str, Any] = {}
    calls_per_step = 1
    replays = True
    keeps_state = False
    says_resumed = ""
    no_resume = ""
    samples = ("sampled", "sampled_plain")

    def prepare(self, host: Script) -> None:
        """Writes data and networks into `host.work`."""
        raise NotImplementedError

    def arguments(self, work: Path, part: Part) -> list[str]:
        """The arguments of the training script."""
        raise NotImplementedError

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        """The checkpoint that the part `name` wrote after so many epochs."""
        raise NotImplementedError

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        """The arguments of the sampling script."""
        raise NotImplementedError

    def variables(self, work: Path, name: str) -> dict[str, str]:
        """Variables of the environment for one run."""
        return {}

    def index(self, t: Tensor) -> Tensor:
        """The policy's index (B,) for the t that the model saw."""
        return t.long()

    def time(self, t: Tensor) -> Tensor:
        """Time (B,) in [0, 1], 1 is noise, for the t that the model saw."""
        return (t + 0.5) / 1000

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs the trainings and their checks."""
        host = Script(checkout, work, self.model, self.factories, **self.options)
        self.prepare(host)
        long, ours = Part("long", self.num_epochs), ["--policy", POLICY]
        state = ours if self.keeps_state else [*ours, "--state", str(work / "state.pt")]
        runs = {
            "long": self._run(host, long, launch=ours),
            "uniform": self._run(host, Part("uniform", 1), launch=["--policy", "uniform"]),
            "plain": self._run(host, Part("plain", 1), replay="uniform" if self.replays else ""),
        }
        if not self.no_resume:
            runs["first"] = self._run(host, Part("first", 1), launch=state)
            runs["second"] = self._run(host, Part("second", 2, "first"), launch=state)
        if "sampled" in self.samples:
            checkpoint = self.checkpoint(work, "long", self.num_epochs)
            runs["sampled"] = self.sampled(host, "sampled", checkpoint, launch=ours)
            runs["sampled_plain"] = self.sampled(host, "sampled_plain", checkpoint)
        return self._result(runs, work)

    def sampled(self, host: Script, name: str, checkpoint: Path, **options: Any) -> Run:
        """A run of the sampling script, with its samples in the record."""
        options["variables"] = self.variables(host.work, name)
        return host.run(name, self.sampler, self.sampling(host.work, checkpoint), **options)

    def _run(self, host: Script, part: Part, **options: Any) -> Run:
        options["variables"] = self.variables(host.work, part.name)
        return host.run(part.name, self.script, self.arguments(host.work, part), **options)

    def _result(self, runs: dict[str, Run], work: Path) -> Result:
        result = Result(self.name, seconds=sum(run.seconds for run in runs.values()))
        record = runs["long"].records[0]
        result.stand_ins = record.stand_ins
        result.commands = [f"{run.script} {' '.join(run.arguments)}" for run in runs.values()]
        weight = build_policy(POLICY, self.schedule()).weight
        result.checks = {
            "exit": _exits(runs),
            "law": self._law(record),
            "loss": checks.loss(weight, [record], self.index),
            "uniform": self._uniform(runs, work),
            "sampling": checks.same_samples(*(runs[name].records[0] for name in self.samples)),
            "resume": Check(None, self.no_resume) if self.no_resume else self._resumed(runs),
        }
        return result

    def _law(self, record: Record) -> Check:
        """The law of the draws, each counted once."""
        calls = [record.t[first :: self.calls_per_step] for first in range(self.calls_per_step)]
        alike = all(all(map(torch.equal, calls[0], others)) for others in calls[1:])
        found = checks.law(checks.tenths(POLICY, self.schedule()), [self.time(t) for t in calls[0]])
        if self.calls_per_step > 1:
            found.words += f"; {self.calls_per_step} calls of a step are at one t: {alike}"
        return Check(bool(found.holds and alike), found.words)

    def _uniform(self, runs: dict[str, Run], work: Path) -> Check:
        found = checks.same_steps(runs["uniform"].records[0], runs["plain"].records[0])
        if found.holds:
            pair = [tensors(self.checkpoint(work, name, 1)) for name in ("uniform", "plain")]
            equal = bool(pair[0]) and checks.same_tensors(*pair)
            found = Check(equal, f"{found.words}; equal checkpoints: {equal}")
        return found

    def _resumed(self, runs: dict[str, Run]) -> Check:
        """Whether a training in two parts draws what one in a single part draws."""
        parts = [*runs["first"].records[0].t, *runs["second"].records[0].t]
        whole = runs["long"].records[0].t[: len(parts)]
        steps = len(runs["uniform"].records[0].t)
        equal = len(parts) == 2 * steps > 0 and all(map(torch.equal, parts, whole))
        took_over = runs["second"].said(self.says_resumed)
        kept = "alone" if self.keeps_state else "and --state"
        words = f"the host's checkpoint {kept}: {len(parts)} draws of two parts "
        words += "are those of one run" if equal else "are not those of one run"
        return Check(equal and took_over, words if took_over else f"{words}; the checkpoint was not read")


def _exits(runs: dict[str, Run]) -> Check:
    """Whether all runs ended as they should; a sampling script under the launcher trains nothing."""
    wanted = {name: 2 if name == "sampled" else 0 for name in runs}
    bad = [
        f"{name} {run.exit_code}: {run.last_words()}"
        for name, run in runs.items()
        if run.exit_code != wanted[name]
    ]
    words = f"0 in {len([name for name in runs if not wanted[name]])} runs"
    if "sampled" in runs:
        words += f"; {runs['sampled'].script} under the launcher 2, since it trains nothing"
    return Check(not bad, "; ".join(bad) or words)


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their place in it; none if there is no file."""
    if not checkpoint.is_file():
        return {}
    # Several hosts keep their arguments beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(checkpoint, weights_only=True)
    found: dict[str, Tensor] = {}

    def collect(value: Any, place: str) -> None:
        if isinstance(value, Tensor):
            found[place] = value
        elif isinstance(value, Mapping):
            for key, each in value.items():
                collect(each, f"{place}.{key}")

    collect(saved, "")
    return found


def images_of(record: Record, files: list[Path]) -> None:
    """Adds pictures that a sampling script wrote to its record, in [0, 255]."""
    import numpy as np
    from PIL import Image

    record.samples += [torch.from_numpy(np.array(Image.open(file))).float() for file in files]
