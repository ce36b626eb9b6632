"""What a race found: seconds until ours are as good as each peer at its end, and the targets."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.crossing import EXACT, MIXED, REVERSED, Reading, first_crossing
from benchmarks.race.hosts import PEERS
from benchmarks.race.laps import Lap

# How many times faster ours should be to a peer's own final distance.
TARGETS: Mapping[str, float] = {"facebookresearch/DiT": 8, "SiT": 3, "LightningDiT": 2, "REPA": 2}
# Our distance at the end may be this much above a peer's and still count as no worse: the standard deviation
# that 500 samples leave is of this order.
NO_WORSE = 1.05


@dataclass(frozen=True)
class Run:
    """One training of the race: its laps in the order of their steps."""

    laps: Sequence[Lap]

    @property
    def last(self) -> Lap:
        return self.laps[-1]

    def until(self, level: float, space: str = "", *, clock: str = "seconds") -> Reading:
        """Training until the distance is at most `level`, in seconds, cpu_seconds or step."""
        times = [getattr(lap, clock) for lap in self.laps]
        return first_crossing(times, [lap.in_space(space) for lap in self.laps], level)


@dataclass(frozen=True)
class Field:
    """All runs of a race: by entry and seed, a peer with its best factor."""

    peers: Mapping[str, Mapping[int, Run]]
    ours: Mapping[str, Mapping[int, Run]]

    @classmethod
    def of(cls, laps: Sequence[Lap]) -> "Field":
        """Sorts lines. Unfinished trainings are left out."""
        runs: dict[tuple[str, str], dict[int, list[Lap]]] = {}
        for lap in laps:
            runs.setdefault((lap.entry, lap.contestant), {}).setdefault(lap.seed, []).append(lap)
        names = {peer.name for peer in PEERS}
        found: dict[str, dict[int, Run]] = {}
        for (entry, _), seeds in runs.items():
            ends = {
                seed: Run(sorted(part, key=lambda lap: lap.step))
                for seed, part in seeds.items()
                if max(lap.step for lap in part) == part[0].settings["steps"]
            }
            if ends and (entry not in found or _mean_end(ends) < _mean_end(found[entry])):
                found[entry] = ends
        return cls(
            {name: run for name, run in found.items() if name in names},
            {name: run for name, run in found.items() if name not in names},
        )

    def speed_ups(self, peer: str, name: str, space: str = "", *, clock: str = "seconds") -> list[Reading]:
        """The peer's time over ours to its own final distance, for each seed that both have.

        The clock is as in `Run.until`.
        """
        found = []
        for seed, run in self.peers[peer].items():
            if seed in self.ours[name]:
                reached = self.ours[name][seed].until(run.last.in_space(space), space, clock=clock)
                found.append(Reading(getattr(run.last, clock) / reached.value, REVERSED[reached.bound]))
        return found


def report(laps: Sequence[Lap]) -> str:
    """Markdown: what was raced, the table of each space, the contestants, and the targets."""
    if not laps:
        return "no results yet"
    field, spaces = Field.of(laps), list(laps[0].distances)
    parts = [_heading(laps[0]), _notes(laps)]
    for number, space in enumerate(spaces):
        title = "which decides the race" if number == 0 else "beside it"
        parts.append(f"## To a peer's final distance in {space}, {title}\n\n{table(field, space)}")
    parts += [f"## Contestants\n\n{contestants(field, spaces)}", f"## Targets\n\n{targets(field)}"]
    return "\n\n".join(parts)


def table(field: Field, space: str) -> str:
    """A row per peer: its seconds and final distance, then seconds and ratio of each of ours."""
    names = list(field.ours)
    heads = ["peer", "seconds to its end", "its final distance", *names]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for peer, runs in field.peers.items():
        lasts = [run.last for run in runs.values()]
        cells = [
            peer,
            f"{_mean([lap.seconds for lap in lasts]):.0f}",
            f"{_mean([lap.in_space(space) for lap in lasts]):.3f}",
        ]
        rows.append(f"| {' | '.join([*cells, *(_cell(field, peer, name, space) for name in names)])} |")
    ends = [_mean([run.last.in_space(space) for run in field.ours[name].values()]) for name in names]
    rows.append(f"| ours at the end | | | {' | '.join(f'{end:.3f}' for end in ends)} |")
    note = (
        "Cells: our seconds to that distance, and the peer's seconds over them; in brackets the ratio of"
        " processor seconds. >= and <= mark bounds, where ours were there at their first evaluation or never."
    )
    return "\n".join([*rows, "", note])


def contestants(field: Field, spaces: Sequence[str]) -> str:
    """A row per contestant: parameters, set-up, seconds, and final distances."""
    heads = ["contestant", "parameters", "in training only", "set-up", "seconds", "processor seconds"]
    heads += ["ms a step", *(f"final, {space}" for space in spaces), "seeds"]
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for runs in [*field.peers.values(), *field.ours.values()]:
        lasts = [run.last for run in runs.values()]
        seconds = _mean([lap.seconds for lap in lasts])
        cells = [
            lasts[0].contestant,
            f"{lasts[0].num_parameters:,}",
            f"{lasts[0].num_training_only:,}",
            f"{_mean([lap.setup_seconds for lap in lasts]):.1f} s",
            f"{seconds:.0f}",
            f"{_mean([lap.cpu_seconds for lap in lasts]):.0f}",
            f"{1000 * seconds / lasts[0].step:.1f}",
            *(f"{_mean([lap.in_space(space) for lap in lasts]):.3f}" for space in spaces),
            str(len(lasts)),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def targets(field: Field) -> str:
    """A line per target: the fastest of ours that ends no worse, and by how much it is met or missed."""
    lines = []
    for peer, wanted in TARGETS.items():
        if peer not in field.peers or not field.ours:
            lines.append(f"- {peer}, {wanted:g} times: not raced.")
            continue
        level = _mean_end(field.peers[peer])
        ratios = {name: mean_of(field.speed_ups(peer, name)) for name in field.ours}
        fine = {name: r for name, r in ratios.items() if _mean_end(field.ours[name]) <= NO_WORSE * level}
        name, ratio = max((fine or ratios).items(), key=lambda pair: pair[1].value)
        share = ratio.value / wanted
        verdict = f"met, {share:.2f} of it" if share >= 1 else f"missed, {share:.2f} of it"
        in_steps = mean_of(field.speed_ups(peer, name, clock="step"))
        parts = f"{in_steps} in steps, {ratio.value / in_steps.value:.2f} in seconds a step"
        end = f"{_mean_end(field.ours[name]):.3f} against {level:.3f} at the end"
        worse = "" if fine else "; all of ours end worse"
        lines.append(f"- {peer}, {wanted:g} times: {verdict}. {name}: {ratio} times ({parts}), {end}{worse}.")
    return "\n".join(lines)


def mean_of(readings: Sequence[Reading]) -> Reading:
    """The geometric mean of ratios; it is a bound if one of them is. No reading gives nan."""
    if not readings:
        return Reading(math.nan)
    bounds = {reading.bound for reading in readings} - {EXACT}
    bound = EXACT if not bounds else MIXED if len(bounds) > 1 else bounds.pop()
    return Reading(statistics.geometric_mean(reading.value for reading in readings), bound)


def _cell(field: Field, peer: str, name: str, space: str) -> str:
    levels = {seed: run.last.in_space(space) for seed, run in field.peers[peer].items()}
    reached = [run.until(levels[seed], space) for seed, run in field.ours[name].items() if seed in levels]
    seconds = mean_of(reached)
    ratios = field.speed_ups(peer, name, space)
    ratio, cpu = mean_of(ratios), mean_of(field.speed_ups(peer, name, space, clock="cpu_seconds"))
    spread = ""
    if len(ratios) > 1:
        values = [reading.value for reading in ratios]
        spread = f" ({min(values):.2f} to {max(values):.2f}, N = {len(values)})"
    return f"{seconds.bound}{seconds.value:.1f} s, {ratio}{spread} [{cpu}]"


def _heading(lap: Lap) -> str:
    own = dict(lap.settings)
    return (
        f"{own['data']} at {own['image_size']} pixels, {own['steps']} steps of {own['batch_size']} images,"
        f" patches of {own['patch_size']}, width {own['width']}, depth {own['depth']};"
        f" {own['num_samples']} samples of {own['calls']} calls; {own['device']}, {own['threads']} threads,"
        f" {own['machine']}; begun {lap.runs[0]}."
    )


def _notes(laps: Sequence[Lap]) -> str:
    runs = {tuple(lap.runs) for lap in laps if lap.step == lap.settings["steps"]}
    shared = "All contestants took turns in the same runs."
    if len(runs) > 1:
        shared = f"Not all contestants took turns in the same runs: {len(runs)} sets of runs are compared."
    return (
        "Peers keep their own model, losses, draw, optimizer and clipping. Their learning rates and averages"
        " are made for hundreds of thousands of steps. Here every learning rate is the published one times"
        " the same factor (a peer's best factor if several were tried), and every average forgets half in a"
        " twentieth of the steps; a row of ours may have another rate and schedule. All train on pixels,"
        " where the peers' scripts train on latents. REPA's teacher is the embedded ImageNet network, not"
        " DINOv2. LightningDiT's cosine loss has no gradient on a single channel. Peers' batches lie in"
        " memory; ours come from our loader. Seconds are of training steps alone. " + shared
    )


def _mean_end(runs: Mapping[int, Run]) -> float:
    return _mean([run.last.distance for run in runs.values()])


def _mean(values: Sequence[float]) -> float:
    return math.inf if any(math.isinf(value) for value in values) else statistics.fmean(values)
