"""The checks of a whole training, and how their results are shown.

Dims: B batch, T timesteps.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from whole_trainings.recording import Record

# The columns of the table, in this order.
CHECKS = ("exit", "law", "loss", "uniform", "sampling", "resume")
# The contract's tolerance: relative to the direct sum.
LOSS_TOLERANCE = 2e-7
# The mean of a batch, which a script reports, rounds once more in each sum: four steps of float32.
MEAN_TOLERANCE = 4 * 2**-23
SIGMAS = 4.0


@dataclass
class Check:
    """One result.

    Args:
        holds: None if it was not checked.
        words: what was found, or why it was not checked.
    """

    holds: bool | None
    words: str


@dataclass
class Result:
    """All results of one host.

    Args:
        host: name and version.
        checks: by the names in `CHECKS`.
        stand_ins: what was replaced.
        commands: the runs, in the host's own words.
        seconds: of all runs together.
    """

    host: str
    checks: dict[str, Check] = field(default_factory=dict)
    stand_ins: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def holds(self) -> bool:
        """Whether something was checked, and nothing failed."""
        found = [check.holds for check in self.checks.values()]
        return any(found) and False not in found

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "holds": self.holds}


def tenths(policy: str, schedule: NoiseSchedule, batch_size: int = 64) -> Tensor:
    """The policy's share of draws in each tenth of time, float64 (10,)."""
    density = build_policy(policy, schedule).density_for(batch_size)
    return density.view(10, -1).sum(1)


def fit(shares: Tensor, seen: Sequence[Tensor]) -> dict[str, Any]:
    """How far the share of times in each tenth is from the expected and from 0.1, in binomial sigmas.

    Args:
        shares: expected, shape (10,); they sum to 1.
        seen: batches of times in [0, 1].
    """
    if not seen:
        return {"draws": 0, "worst_sigma": float("inf")}
    tenth = (torch.cat(list(seen)).double() * 10).long().clamp(max=9)
    found = torch.bincount(tenth, minlength=10) / len(tenth)

    def worst(expected: Tensor) -> float:
        sigma = (expected * (1 - expected) / len(tenth)).sqrt()
        return round(float(((found - expected).abs() / sigma).max()), 2)

    equal = torch.full_like(shares, 0.1)
    return {"draws": len(tenth), "worst_sigma": worst(shares), "sigma_from_uniform": worst(equal)}


def law(shares: Tensor, seen: Sequence[Tensor]) -> Check:
    """Whether each tenth is within 4 sigma. Arguments as in `fit`."""
    fitted = fit(shares, seen)
    words = f"{fitted['draws']} draws, worst tenth {fitted['worst_sigma']} sigma"
    if fitted["draws"]:
        words += f" (from uniform {fitted['sigma_from_uniform']})"
    return Check(fitted["draws"] > 0 and fitted["worst_sigma"] < SIGMAS, words)


def loss_error(weight: Tensor, record: Record, index_of: Callable[[Tensor], Tensor]) -> float:
    """The largest relative error of the reported loss against w * mse + vb.

    Args:
        weight: of the policy, (T,).
        record: of one rank.
        index_of: turns the t that the model saw into the policy's index.
    """
    worst = 0.0
    for t, terms in zip(record.t, record.terms, strict=True):
        expected = weight[index_of(t)].to(terms["loss"].dtype) * terms["mse"]
        if "vb" in terms:
            expected = expected + terms["vb"]
        # A script reports one number for the batch.
        expected = expected if terms["loss"].dim() else expected.mean()
        error = (terms["loss"] - expected).abs() / expected.abs().clamp(min=1e-30)
        worst = max(worst, float(error.max()))
    return worst if record.terms else float("inf")


def loss(weight: Tensor, records: Sequence[Record], index_of: Callable[[Tensor], Tensor]) -> Check:
    """Whether the reported loss is w * mse + vb. Arguments as in `loss_error`."""
    error = max(loss_error(weight, record, index_of) for record in records)
    steps = sum(len(record.t) for record in records)
    is_mean = any(not terms["loss"].dim() for record in records for terms in record.terms)
    tolerance = MEAN_TOLERANCE if is_mean else LOSS_TOLERANCE
    return Check(error <= tolerance, f"{steps} steps, largest relative error {error:.1e}")


def same_steps(ours: Record, hosts: Record) -> Check:
    """Whether two runs saw the same t and had the same losses, to the bit, in every step."""
    steps = len(hosts.t)
    if not steps or len(ours.t) != steps:
        return Check(False, f"{len(ours.t)} steps with the plugin, {steps} without")
    for step, pair in enumerate(zip(ours.t, hosts.t, ours.terms, hosts.terms, strict=True)):
        if not torch.equal(pair[0], pair[1]):
            return Check(False, f"t differs in step {step}")
        if not torch.equal(pair[2]["loss"], pair[3]["loss"]):
            gap = float((pair[2]["loss"] - pair[3]["loss"]).abs().max())
            return Check(False, f"the losses of step {step} differ by {gap:.1e}")
    return Check(True, f"{steps} steps with equal losses, to the bit")


def same_tensors(ours: dict[str, Tensor], hosts: dict[str, Tensor]) -> bool:
    """Whether two state dicts are equal to the bit."""
    return ours.keys() == hosts.keys() and all(torch.equal(ours[name], hosts[name]) for name in ours)


def same_samples(ours: Record, hosts: Record) -> Check:
    """Whether two runs sampled the same, to the bit."""
    if not hosts.samples or len(ours.samples) != len(hosts.samples):
        return Check(False, f"{len(ours.samples)} samples with the plugin, {len(hosts.samples)} without")
    equal = all(torch.equal(*pair) for pair in zip(ours.samples, hosts.samples, strict=True))
    finite = all(bool(each.isfinite().all()) for each in hosts.samples)
    words = "equal to the bit" if equal else "they differ"
    return Check(equal and finite, words if finite else f"{words}, not finite")


def table(results: Sequence[Result]) -> str:
    """A text table: yes, NO, or - for what was not checked; then what was found."""
    marks = {True: "yes", False: "NO", None: "-"}
    rows = [("host", *CHECKS, "minutes")]
    for result in results:
        found = [marks[result.checks[name].holds] if name in result.checks else "-" for name in CHECKS]
        rows.append((result.host, *found, f"{result.seconds / 60:.1f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for result in results:
        lines += ["", result.host]
        lines += [f"  {name}: {check.words}" for name, check in result.checks.items()]
        lines += [f"  stand-in: {name}" for name in result.stand_ins]
    return "\n".join(line.rstrip() for line in lines)


def to_json(results: Sequence[Result]) -> str:
    """All results as JSON."""
    return json.dumps([result.as_json() for result in results], indent=1)
