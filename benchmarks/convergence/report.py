"""The outcome of a convergence run as one JSON document, and its table.

The document holds everything that plots and tables need: the curves, the speed-ups at every horizon, the
bands, the options and the machine.
"""

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.convergence.paired_run import BASELINE, Results
from benchmarks.convergence.policy_pace import Pace
from benchmarks.crossing import REVERSED, Reading
from benchmarks.stacked.training import Member
from speedit_plugins.policies.policy import TimestepPolicy
from speedit_plugins.trainer.logging.environment import versions

Document = dict[str, Any]
_PACKAGES = ("torch", "numpy", "diffusers", "scikit-learn")


def document(results: Results, paces: Mapping[str, Pace], *, command: str, date: str) -> Document:
    """Plain values for JSON. Distances of samples that are not finite are None, and the band of one seed."""
    protocol = results.protocol
    return {
        "command": command,
        "date": date,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions(_PACKAGES)},
        "protocol": asdict(protocol),
        "num_parameters": results.num_parameters,
        "seconds": results.seconds,
        "evaluations": list(protocol.evaluations),
        "baseline": BASELINE,
        "members": [
            {**_described(curve.member), "distances": {k: _finite(v) for k, v in curve.distances.items()}}
            for curve in results.curves
        ],
        "by_sampler": {sampler: _compared(results, sampler) for sampler in protocol.samplers},
        "paces": {name: asdict(pace) for name, pace in paces.items()},
    }


def table(found: Document, sampler: str) -> str:
    """A Markdown table with one row per policy, at the protocol's horizon and for one of its samplers."""
    horizon = found["protocol"]["horizon"]
    band = found["by_sampler"][sampler]["null_band"][str(horizon)]
    chance = "unknown" if band is None else " to ".join(_shown(end) for end in band)
    lines = [
        f"Speed-up at {horizon} steps, {sampler}; by chance alone {chance}"
        f" ({found['baseline']} seeds against each other).",
        "",
        f"    {found['command']}",
        "",
        "| policy | speed-up | 95 % interval | median | per seed | distance | steps/s | seconds | draw |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    baseline = found["by_sampler"][sampler]["speed_ups"][found["baseline"]][str(horizon)]
    base_pace = found["paces"][found["baseline"]]["steps_per_second"]
    for name, horizons in found["by_sampler"][sampler]["speed_ups"].items():
        at = horizons[str(horizon)]
        pace = found["paces"][name]
        seconds = horizon / at["mean"] / pace["steps_per_second"]
        mark = at["bound"]
        # One seed alone gives nothing to resample.
        interval = f"{mark}{at['low']:.2f}, {mark}{at['high']:.2f}" if at["num_seeds"] > 1 else "-"
        seeds = " ".join(_shown(reading) for reading in at["seeds"].values())
        lines.append(
            f"| {name} | {mark}{at['mean']:.2f} | {interval} | {mark}{at['median']:.2f} | {seeds}"
            f" | {_mean_distance(found, name, sampler):.2f} | {pace['steps_per_second']:.1f}"
            f" | {REVERSED[mark]}{seconds:.1f} | {pace['policy_microseconds']:.0f} us |"
        )
    lines += [
        "",
        f"seconds: of a lone training on one thread to the distance that {found['baseline']} has at {horizon}"
        f" steps, itself after {horizon / base_pace:.1f}; draw: with weights and learning, of a step.",
        "<= and >= mark a bound, not reached in the run, or before its first evaluation; ~ a mean of both.",
    ]
    if any(reading["value"] > 1 for reading in baseline["seeds"].values()):
        lines.append(
            f"The curve of {found['baseline']} was as far as at {horizon} steps before: it does not fall yet,"
            " and this horizon says nothing."
        )
    return "\n".join(lines)


def side_by_side(documents: Mapping[str, Document]) -> str:
    """A Markdown table of the speed-ups of several runs at their horizons, under the first sampler of each.

    A column is a run, with - for a policy that it does not have.
    """
    columns = [_speed_up_column(found) for found in documents.values()]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [f"| {name} | {' | '.join(column.get(name, '-') for column in columns)} |" for name in names]
    header = f"| fewer steps to equal distance | {' | '.join(documents)} |"
    return "\n".join([header, "|---" * (1 + len(columns)) + "|", *rows])


def _compared(results: Results, sampler: str) -> Document:
    horizons = results.protocol.evaluations
    bands = {str(s): results.null_band(horizon=s, sampler=sampler) for s in horizons}
    return {
        "null_band": {s: band and [asdict(end) for end in band] for s, band in bands.items()},
        "speed_ups": {
            name: {str(s): _at_horizon(results, name, s, sampler) for s in horizons}
            for name in results.names()
        },
    }


def _at_horizon(results: Results, name: str, horizon: int, sampler: str) -> Document:
    readings = results.speed_ups(name, horizon=horizon, sampler=sampler)
    seeds = {str(seed): asdict(reading) for seed, reading in readings.items()}
    return {**asdict(results.summary(name, horizon=horizon, sampler=sampler)), "seeds": seeds}


def _described(member: Member) -> Document:
    policy = str(member.policy) if isinstance(member.policy, TimestepPolicy) else member.policy
    return {
        "name": member.name,
        "policy": policy if isinstance(policy, str) else dict(policy),
        "seed": member.seed,
        "lr": member.lr,
        "prediction_type": member.prediction_type,
    }


def _speed_up_column(found: Document) -> dict[str, str]:
    """Policy -> mean speed-up and its interval, under the first sampler; and what chance alone gives."""
    horizon, sampler = str(found["protocol"]["horizon"]), found["protocol"]["samplers"][0]
    compared = found["by_sampler"][sampler]
    band = compared["null_band"][horizon]
    column = {"by chance": "unknown" if band is None else " to ".join(map(_shown, band))}
    for name, horizons in compared["speed_ups"].items():
        at = horizons[horizon]
        interval = f" ({at['low']:.2f}, {at['high']:.2f})" if at["num_seeds"] > 1 else ""
        column[name] = f"{at['bound']}{at['mean']:.2f}{interval}"
    return column


def _mean_distance(found: Document, name: str, sampler: str) -> float:
    place = found["evaluations"].index(found["protocol"]["horizon"])
    reached = [m["distances"][sampler][place] for m in found["members"] if m["name"] == name]
    return math.inf if None in reached else sum(reached) / len(reached)


def _shown(reading: Document) -> str:
    return str(Reading(reading["value"], reading["bound"]))


def _finite(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]
