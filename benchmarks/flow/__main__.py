"""Which law of timesteps trains a flow fastest? Many laws on several data sets, in as many runs as it takes.

Each finished training is a line of a results file: its distances to the data over the steps. Trainings that
are in the file already are skipped. A seed decides initialisation, data order and noise for all laws. So
every law is compared with `uniform` of the same seed.

    python -m benchmarks.flow --data fashion_16 --laws coarse --seeds 100 --data-dir DIR --out FILE
    python -m benchmarks.flow --data fashion_16 --laws widths --seeds 100 --data-dir DIR --out FILE
    python -m benchmarks.flow --data fashion_16 --laws finalists --seeds 100 101 --data-dir DIR --out FILE
    python -m benchmarks.flow --data fashion_16 --laws auto best --seeds 0 1 2 --data-dir DIR --out FILE
    python -m benchmarks.flow --report --out FILE

The seeds from 100 on choose the best law of the grid, as in the first three lines, or at once with `grid`.
The others say how fast the laws are.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.flow.laws import Policy, coarse_laws, laws, policy_of, widths_at_best_mean
from benchmarks.flow.report import leading, report
from benchmarks.flow.results import Result, read_results
from benchmarks.flow.sets import SETS, FlowSet, load_flow_set
from benchmarks.results_file import append, check_exists, revision, say
from benchmarks.stacked.fine_tuning import going_on
from benchmarks.stacked.sample_quality import SampleDraws, Sampler
from benchmarks.stacked.training import SETTINGS, Member, StackedTraining, build_member_policy, build_process
from speedit_plugins.policies.build import build_policy
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.trainer.evaluation.distances import FeatureStatistics

# Shares of the horizon at which samples are drawn.
EVALUATED = (0.1, 0.25, 0.5, 1.0)
# Small models train faster as one, larger ones no longer fit in the cache.
SMALL_WIDTH, SMALL_STACK, LARGE_STACK = 48, 8, 2
# Laws that a second selection seed compares.
NUM_FINALISTS = 3


@dataclass(frozen=True)
class Options:
    """What all members of a run share, beside the data set.

    Args:
        horizon: steps of a training; 0 takes the data set's.
        samplers: names, see `stacked.sample_quality.Sampler`; () takes Euler with 25 steps.
        num_samples: N of each distance.
        prediction: flow; or epsilon, x0 or v on the linear schedule.
        lr: learning rate.
    """

    horizon: int = 0
    samplers: tuple[str, ...] = ()
    num_samples: int = 500
    prediction: str = "flow"
    lr: float = Member.lr

    @property
    def schedule(self) -> str:
        return "rectified_flow" if self.prediction == "flow" else "linear"


class Distances(SampleDraws):
    """Draws samples of trained members and measures their distances in every space of the data set."""

    def __init__(self, flow_set: FlowSet, samplers: Sequence[str], num_samples: int) -> None:
        super().__init__(flow_set.data, num_samples)
        self._samplers = {name: Sampler.named(name) for name in samplers}
        self._spaces = flow_set.spaces
        self._real = {
            name: FeatureStatistics.of(space(flow_set.reference)) for name, space in self._spaces.items()
        }

    def of_stack(self, stack: StackedTraining) -> Iterator[dict[str, dict[str, float]]]:
        """Sampler -> space -> distance, of each member."""
        for member, model in self.models(stack):
            yield {
                name: self.of(self.draw(model, stack.process, member.seed, sampler))
                for name, sampler in self._samplers.items()
            }

    def of(self, samples: Tensor) -> dict[str, float]:
        """Space -> squared Fréchet distance of samples (N, C, H, W); infinite if one is not finite."""
        if not samples.isfinite().all():
            return dict.fromkeys(self._spaces, float("inf"))
        found = {}
        for name, space in self._spaces.items():
            ours, real = FeatureStatistics.of(space(samples)), self._real[name]
            found[name] = ours.frechet_distance(real)
        return found


class Runner:
    """Trains what a results file lacks of one data set.

    Args:
        name: of the data set.
        folder: with its files.
        options: see `Options`.
        out: the results file.
        summary: file that the report is written to after each stack; None for none.
    """

    def __init__(
        self, name: str, folder: Path, options: Options, out: Path, *, summary: Path | None = None
    ) -> None:
        self.name, self.options, self.out, self.summary = name, options, out, summary
        self.flow_set = load_flow_set(name, folder)
        self.horizon = options.horizon or self.flow_set.horizon
        self.steps = tuple(dict.fromkeys(max(1, round(share * self.horizon)) for share in EVALUATED))
        self.samplers = options.samplers or self._usual_sampler()

    def run(self, names: Sequence[str], seeds: Sequence[int], *, again: Sequence[str] = ()) -> None:
        """Trains each law with each seed, law by law, and appends each stack's results as it ends.

        Args:
            names: of the laws.
            seeds: of the trainings.
            again: laws whose results only count if this revision of the code made them.
        """
        wanted = [self._member(name, seed) for name in names for seed in seeds]
        results = read_results(self.out)
        done = {r.key for r in results if r.law not in again or r.revision == revision()}
        missing = [member for member in wanted if self._result(member).key not in done]
        trained = [name for name in names if self._can_train(self._member(name, seeds[0]))]
        members = [member for member in missing if member.label in trained]
        say(f"{self.name}: {len(wanted)} trainings, {len(wanted) - len(missing)} done, {len(members)} to do")
        size = SMALL_STACK if self.flow_set.shape.width <= SMALL_WIDTH else LARGE_STACK
        for first in range(0, len(members), size):
            self._train(members[first : first + size])

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What is known of the data set before any training."""
        images = self.flow_set.data.images
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        floor = self._distances.of(images[rows[: self.options.num_samples]])
        return {
            "num_samples": len(images),
            "shape": list(images.shape[1:]),
            "centre": DataSpectrum.of(self.flow_set.reference).log_snr_at(),
            "std": float(images.std()),
            "floor": floor,
        }

    @cached_property
    def _distances(self) -> Distances:
        return Distances(self.flow_set, self.samplers, self.options.num_samples)

    def _train(self, members: Sequence[Member]) -> None:
        start = time.perf_counter()
        stack = self._stack(members)
        curves: list[dict[str, dict[str, list[float]]]] = [{} for _ in members]
        for step in self.steps:
            while stack.step < step:
                stack.train_step()
            for curve, found in zip(curves, self._distances.of_stack(stack), strict=True):
                for sampler, spaces in found.items():
                    for space, distance in spaces.items():
                        curve.setdefault(sampler, {}).setdefault(space, []).append(distance)
        seconds = (time.perf_counter() - start) / len(members)
        for member, curve in zip(members, curves, strict=True):
            append(self.out, self._result(member, curve, seconds, self.facts))
            last = {s: round(d[-1], 4) for s, d in curve[self.samplers[0]].items()}
            say(f"{self.name}  {member.name}  seed {member.seed}  {seconds:.0f} s  {last}")
        if self.summary is not None:
            self.summary.write_text(report(read_results(self.out)) + "\n", encoding="utf-8")

    def _stack(self, members: Sequence[Member]) -> StackedTraining:
        data, shape, start = self.flow_set.data, self.flow_set.shape, self.flow_set.start
        if start is None:
            return StackedTraining(members, data, self.options.schedule, shape)
        if self.options.prediction != "flow":
            raise ValueError(f"{self.name} goes on from a flow, got prediction {self.options.prediction}")
        return going_on(members, data, shape, start)

    def _result(
        self,
        member: Member,
        curves: Mapping[str, Any] | None = None,
        seconds: float = 0.0,
        facts: Mapping[str, Any] | None = None,
    ) -> Result:
        options = asdict(self.options) | {
            "horizon": self.horizon,
            "samplers": list(self.samplers),
            "shape": asdict(self.flow_set.shape),
            "steps": list(self.steps),
        }
        return Result(
            data=self.name,
            law=member.label,
            seed=member.seed,
            policy=policy_of(member.label, self.horizon),
            options=options,
            distances=curves or {},
            seconds=round(seconds, 1),
            facts=dict(facts or {}),
            revision=revision(),
        )

    def _member(self, name: str, seed: int) -> Member:
        prediction = self.options.prediction
        policy: Policy | TimestepPolicy = policy_of(name, self.horizon)
        if policy.get("type") == "auto":
            # As on a host: it measures the data of its first steps, and does not get their spectrum.
            schedule = build_process(self.options.schedule, prediction).schedule
            policy = build_policy(policy, schedule, prediction)
        return Member(policy, seed, lr=self.options.lr, prediction_type=prediction, label=name)

    def _can_train(self, member: Member) -> bool:
        process = build_process(self.options.schedule, self.options.prediction)
        try:
            build_member_policy(member, process, self.flow_set.data)
        except (ValueError, TypeError) as error:
            say(f"{self.name}: {member.label} is left out: {str(error).splitlines()[0][:160]}")
            return False
        return True

    def _usual_sampler(self) -> tuple[str, ...]:
        name = SETTINGS[self.options.schedule].sampler
        return (name if self.flow_set.is_clamped else f"{name}-unclamped",)


def main() -> None:
    """Prints a line per training, or the report."""
    arguments, parser = _arguments()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.report:
            check_exists(arguments.out)
            print(report(read_results(arguments.out)))
            return
        options = Options(
            arguments.horizon, tuple(arguments.samplers), arguments.num_samples, arguments.prediction
        )
        for name in arguments.data:
            runner = Runner(name, arguments.data_dir, options, arguments.out, summary=arguments.summary)
            names = _names(arguments.laws, name, runner.horizon, arguments.out)
            runner.run(names, arguments.seeds, again=arguments.again)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _names(given: Sequence[str], data: str, horizon: int, out: Path) -> list[str]:
    """Laws by name, and `uniform`. A key of `_SEARCHES` stands for the laws that it finds."""
    names = ["uniform"]
    for name in given:
        if name in _SEARCHES:
            names += _SEARCHES[name](data, horizon, out)
        else:
            policy_of(name, horizon)
            names.append(name)
    return list(dict.fromkeys(names))


# Each search narrows the last one, so that most trainings go to laws that may be the best.
_SEARCHES: Mapping[str, Callable[[str, int, Path], list[str]]] = {
    "grid": lambda data, horizon, out: list(laws(horizon)),
    "coarse": lambda data, horizon, out: coarse_laws(),
    "widths": lambda data, horizon, out: widths_at_best_mean(leading(read_results(out), data)),
    "finalists": lambda data, horizon, out: leading(read_results(out), data)[:NUM_FINALISTS],
    "best": lambda data, horizon, out: leading(read_results(out), data, only_full=True)[:1],
}


def _arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flow",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("outputs/flow/results.jsonl"), help="results; lines are appended")
    add("--summary", type=Path, help="also write the report to this file after each training")
    add("--report", action="store_true", help="print what the results say, and train nothing")
    add("--data-dir", type=Path, default=Path("outputs/flow/data"), help="see benchmarks/flow/sets.py")
    add("--data", nargs="+", default=["digits_8"], help=f"of {' '.join(SETS)}")
    add("--laws", nargs="+", default=["grid"], help=f"names, or searches: {', '.join(_SEARCHES)}")
    add(
        "--seeds", nargs="+", type=int, default=[100, 101], help="from 100 on they choose the grid's best law"
    )
    add("--again", nargs="+", default=[], help="laws to train again if other code made their results")
    add("--horizon", type=int, default=0, help="steps of a training; 0: the data set's")
    add("--samplers", nargs="+", default=[], help="such as euler-25 heun-25-unclamped")
    add("--num-samples", type=int, default=Options.num_samples, help="of each distance")
    add(
        "--prediction", choices=("flow", "epsilon", "x0", "v"), default="flow", help="what the model predicts"
    )
    add("--threads", type=int, default=1, help="of the CPU")
    return parser.parse_args(), parser


if __name__ == "__main__":
    sys.exit(main())
