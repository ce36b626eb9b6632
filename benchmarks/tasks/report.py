"""What the results of benchmarks/tasks say: steps over uniform draws, by policy and by its centre."""

import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.compose.factors import chance, curve, equal_distance, over_seeds
from benchmarks.compose.results import Training
from benchmarks.crossing import Reading
from benchmarks.tasks.arms import BASE

EXPLAINED = """\
A factor is the steps of uniform draws over the policy's to equal distance, the larger of their distances at
the horizon: above 1 is faster. Seeds are paired. A factor is their geometric mean, with the smallest and the
largest in brackets; `>=` and `<=` mark bounds. By chance: what the seeds of uniform draws give over each
other, 5 to 95 %. The centre is the log-SNR by which a policy is placed, and orders the rows."""

# Policy -> seed -> training.
Policies = Mapping[str, Mapping[int, Training]]


def report(trainings: Sequence[Training]) -> str:
    """Markdown: for each cell and setting a table of factors, and one of distances at the end."""
    parts = [EXPLAINED]
    for policies in groups(trainings):
        first = next(iter(policies[BASE].values()))
        options = first.options
        revisions = {each.revision for by_seed in policies.values() for each in by_seed.values()}
        parts += [
            f"## {first.data}, {first.process}",
            f"{first.num_samples} samples, {first.num_parameters / 1e6:.2f} million parameters,"
            f" {options['horizon']} steps of {options['batch_size']}; {options['num_samples']} samples of"
            f" {options['sampling_steps']} steps are measured. A training takes"
            f" {_seconds(policies):.0f} s of the CPU without measuring. Revisions:"
            f" {', '.join(sorted(revisions))}.",
            _factors(policies),
            _ends(policies),
        ]
    return "\n\n".join(parts)


def groups(trainings: Sequence[Training]) -> Iterator[Policies]:
    """What may be compared, where uniform draws have been trained; policies by their centre."""
    found: dict[str, dict[str, dict[int, Training]]] = {}
    for training in trainings:
        found.setdefault(training.group, {}).setdefault(training.arm, {})[training.seed] = training
    for policies in found.values():
        if BASE in policies:
            yield dict(sorted(policies.items(), key=lambda item: _place(item[1])))


def factors(policies: Policies, policy: str, name: str) -> dict[int, Reading]:
    """Seed -> factor of a policy in a distance, of seeds that uniform draws have too."""
    found = {}
    for seed, training in policies[policy].items():
        base = policies[BASE].get(seed)
        if base is not None:
            found[seed] = equal_distance(training.steps, curve(training, name), curve(base, name)).factor
    return found


def _factors(policies: Policies) -> str:
    names = list(next(iter(policies[BASE].values())).distances)
    lines = [f"| steps of uniform over the policy's | centre | {' | '.join(names)} | N |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for policy in policies:
        if policy != BASE:
            by_name = [factors(policies, policy, name) for name in names]
            cells = [str(over_seeds(list(found.values()))) if found else "-" for found in by_name]
            lines.append(
                f"| {policy} | {_text(_centre(policies[policy]))} | {' | '.join(cells)} | {len(by_name[0])} |"
            )
    by_chance = [chance(policies[BASE], name) for name in names]
    lines.append(f"| by chance | - | {' | '.join(by_chance)} | {len(policies[BASE])} |")
    return "\n".join(lines)


def _ends(policies: Policies) -> str:
    first = next(iter(policies[BASE].values()))
    names = list(first.distances)
    lines = [f"| at the end | centre | {' | '.join(names)} | N |", "|---" * (len(names) + 3) + "|"]
    for policy, by_seed in policies.items():
        ends = [[curve(each, name)[-1] for each in by_seed.values()] for name in names]
        cells = [f"{sum(values) / len(values):.4g}" for values in ends]
        lines.append(f"| {policy} | {_text(_centre(by_seed))} | {' | '.join(cells)} | {len(by_seed)} |")
    floor = [f"{first.floor[name]:.4g}" for name in names]
    lines.append(f"| the data's own | - | {' | '.join(floor)} | - |")
    return "\n".join(lines)


def _centre(by_seed: Mapping[int, Training]) -> float | None:
    """The mean centre of the seeds; None without one."""
    found = [each.centre for each in by_seed.values() if each.centre is not None]
    return sum(found) / len(found) if found else None


def _place(by_seed: Mapping[int, Training]) -> float:
    centre = _centre(by_seed)
    return -math.inf if centre is None else centre


def _text(centre: float | None) -> str:
    return "-" if centre is None else f"{centre:.2f}"


def _seconds(policies: Policies) -> float:
    found = [each.cpu_seconds[-1] for by_seed in policies.values() for each in by_seed.values()]
    return sum(found) / len(found)
