"""What the results of benchmarks/compose say: factors alone, their product, and the factor together."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.compose.arms import AUTO, BASE, JOINT, Arm
from benchmarks.compose.factors import Equal, Factor, chance, curve, equal_distance, over_seeds, product
from benchmarks.compose.results import Pace, Training
from benchmarks.crossing import Reading

EXPLAINED = """\
A factor is the base's steps over the arm's to equal distance: the larger of their distances at the horizon. A
factor in seconds is the same with each arm's seconds a step, measured in turn with the base. Each is the
geometric mean of seeds that are paired with the base's, with the smallest and the largest in brackets; `>=`
and `<=` mark bounds, `~` a mean of bounds of both kinds. The chance band is what the base's seeds give over
each other, 5 to 95 %."""
NO_PACE = "- (no pace)"

# Arm -> seed -> training.
Arms = Mapping[str, Mapping[int, Training]]


@dataclass(frozen=True)
class Group:
    """Trainings of one data set, process and setting.

    Args:
        arms: by name and seed; the newest of several counts.
        paces: by the arm's name; the newest of several with the arm's config counts.
    """

    arms: Arms
    paces: Mapping[str, Pace]

    @property
    def first(self) -> Training:
        """Some training of the base."""
        return next(iter(self.arms[BASE].values()))

    def equals(self, arm: str, space: str) -> dict[int, Equal]:
        """Seed -> steps to equal distance, of seeds that the base has too. {} without the space."""
        found = {}
        for seed, training in self.arms.get(arm, {}).items():
            base = self.arms[BASE].get(seed)
            if base is not None and space in training.distances:
                found[seed] = equal_distance(training.steps, curve(training, space), curve(base, space))
        return found

    def steps(self, arm: str, space: str) -> dict[int, Reading]:
        """Seed -> factor of steps."""
        return {seed: equal.factor for seed, equal in self.equals(arm, space).items()}

    def seconds(self, arm: str, space: str) -> str:
        """The factor in seconds, as text."""
        pace, equals = self.paces.get(arm), self.equals(arm, space)
        if not equals:
            return "-"
        if pace is None:
            return NO_PACE
        horizon = self.first.steps[-1]
        return str(over_seeds([equal.factor_of_seconds(pace, horizon) for equal in equals.values()]))


def report(trainings: Sequence[Training], paces: Sequence[Pace]) -> str:
    """Markdown: for each data set, process and setting a table per feature space."""
    parts = [EXPLAINED]
    for group in groups(trainings, paces):
        first = group.first
        options = first.options
        parts.append(
            f"## {first.data}, {first.process}\n\n"
            f"{first.num_samples} samples; {first.num_parameters / 1e6:.2f} million parameters of the base,"
            f" {options['horizon']} steps of {options['batch_size']}, distances of"
            f" {options['num_samples']} samples with {options['sampling_steps']} steps. {_revisions(group)}"
        )
        parts += [_table(group, space) for space in first.distances]
        parts.append(_sizes(group))
    return "\n\n".join(parts)


def groups(trainings: Sequence[Training], paces: Sequence[Pace]) -> Iterator[Group]:
    """What may be compared with each other, where the base has been trained."""
    found: dict[str, dict[str, dict[int, Training]]] = {}
    for training in trainings:
        found.setdefault(training.group, {}).setdefault(training.arm, {})[training.seed] = training
    for arms in found.values():
        if BASE in arms:
            own = {}
            for pace in paces:
                some = next(iter(arms.get(pace.arm, {}).values()), None)
                if some is not None and _same(pace, some):
                    own[pace.arm] = pace
            yield Group(arms, own)


def _table(group: Group, space: str) -> str:
    bases = group.arms[BASE]
    ends = [curve(training, space)[-1] for training in bases.values()]
    autos = group.steps(AUTO, space)
    lines = [
        f"### {group.first.data}, {group.first.process}, {space}",
        "",
        f"The base's distance at the end {sum(ends) / len(ends):.4f}, the data's own"
        f" {group.first.floor[space]:.4f}. By chance {chance(bases, space)} ({len(bases)} seeds)."
        f" `auto` alone: {_mean(autos)} in steps, {group.seconds(AUTO, space)} in seconds, N = {len(autos)}.",
        "",
        "| acceleration | steps, alone | steps, `auto` alone | product | steps, both | both / product"
        " | seconds, alone | seconds, both | ln distance at the end, alone | both | N alone, both |",
        "|---" * 11 + "|",
    ]
    for alone in _alone(group):
        both = JOINT.join((alone, AUTO))
        cells = [
            _mean(group.steps(alone, space)),
            *_composed(group, alone, both, space),
            group.seconds(alone, space),
            group.seconds(both, space),
            _behind(group, alone, space),
            _behind(group, both, space),
            f"{len(group.steps(alone, space))}, {len(group.steps(both, space))}",
        ]
        if any(group.steps(arm, space) for arm in (alone, both)):
            lines.append(f"| {alone} | {' | '.join(cells)} |")
    return "\n".join([*lines, *_stacks(group, space)])


def _composed(group: Group, alone: str, both: str, space: str) -> list[str]:
    """`auto` alone, the product, both, and both over the product, of the seeds that have all three."""
    parts = [group.steps(arm, space) for arm in (alone, AUTO, both)]
    seeds = [seed for seed in parts[0] if all(seed in part for part in parts)]
    if not seeds:
        known = [seed for seed in parts[0] if seed in parts[1]]
        products = {seed: product([parts[0][seed], parts[1][seed]]) for seed in known}
        return [_mean({seed: parts[1][seed] for seed in known}), _mean(products), _mean(parts[2]), "-"]
    products = {seed: product([parts[0][seed], parts[1][seed]]) for seed in seeds}
    shares = {seed: Reading(parts[2][seed].value / products[seed].value) for seed in seeds}
    return [
        *(_mean({seed: part[seed] for seed in seeds}) for part in (parts[1], products, parts[2])),
        _mean(shares),
    ]


def _stacks(group: Group, space: str) -> list[str]:
    """A table of the arms with several accelerations, against the product of their parts."""
    lines = []
    for name in group.arms:
        arm = Arm.named(name)
        if len(arm.accelerations) < 2 or not (measured := group.steps(name, space)):
            continue
        parts = [group.steps(part, space) for part in arm.parts]
        seeds = [seed for seed in measured if all(seed in part for part in parts)]
        products = {seed: product([part[seed] for part in parts]) for seed in seeds}
        cells = [_mean(products), _mean(measured), group.seconds(name, space), str(len(measured))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if not lines:
        return []
    return [
        "",
        "| stack | product of its parts | steps, measured | seconds, measured | N |",
        "|---" * 5 + "|",
        *lines,
    ]


def _alone(group: Group) -> list[str]:
    """Arms without `auto`, also those that only ran with it; single accelerations first."""
    found = dict.fromkeys(JOINT.join(Arm.named(name).accelerations) for name in group.arms)
    return sorted((name for name in found if name), key=lambda name: name.count(JOINT))


def _behind(group: Group, arm: str, space: str) -> str:
    """The mean ln of the distance at the end over the base's; below 0 is nearer to the data."""
    found = []
    for seed, training in group.arms.get(arm, {}).items():
        if seed in group.arms[BASE] and space in training.distances:
            base = group.arms[BASE][seed]
            found.append(math.log(curve(training, space)[-1] / curve(base, space)[-1]))
    return f"{sum(found) / len(found):+.3f}" if found else "-"


def _sizes(group: Group) -> str:
    """A table of what an arm costs: parameters, and seconds of a step over the base's."""
    lines = ["| arm | trained parameters | step over the base's (quartiles) | late | CPU seconds in all |"]
    lines.append("|---" * 5 + "|")
    for name, by_seed in group.arms.items():
        pace, some = group.paces.get(name), next(iter(by_seed.values()))
        cpu = sum(training.cpu_seconds[-1] for training in by_seed.values()) / len(by_seed)
        cells = ["-", "-"]
        if pace is not None:
            cells = [f"{pace.early:.3f} ({pace.spread[0]:.3f} to {pace.spread[1]:.3f})", f"{pace.late:.3f}"]
        lines.append(f"| {name} | {some.num_parameters:,} | {' | '.join(cells)} | {cpu:.0f} |")
    return "\n".join(lines)


def _mean(factors: Mapping[int, Reading]) -> str:
    found: Factor | None = over_seeds(list(factors.values())) if factors else None
    return "-" if found is None else str(found)


def _revisions(group: Group) -> str:
    found = {training.revision for by_seed in group.arms.values() for training in by_seed.values()}
    return f"Revisions of the code: {', '.join(sorted(found))}."


def _same(pace: Pace, training: Training) -> bool:
    found = [[each.data, each.process, each.config] for each in (pace, training)]
    return json.dumps(found[0], sort_keys=True) == json.dumps(found[1], sort_keys=True)
