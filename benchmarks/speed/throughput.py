"""Speed against peers in one run: training steps, the draw of timesteps, sampling, cached latents.

steps     whole training steps of ours and of facebookresearch/DiT, fast-DiT and the SpeeD reference at three
          image shapes, and of Latte at a small shape of its own, in turn; the time is split into phases
draw      a batch's timesteps and weights, against the samplers of SpeeD and guided-diffusion
sampling  model calls to reach the distance of the SpeeD reference's 250 ancestral steps, on digits
latents   a batch from the latent cache, against decoding and encoding its images

A ratio is the peer's seconds over ours within a round: above 1, ours is faster. DIR holds checkouts named
owner+name. A peer without a checkout is left out, and the output names it.

    python -m benchmarks.speed.throughput --hosts DIR [--rounds 5] [--threads 2] [--clock wall]
        [--compile] [--only steps draw sampling latents] [--json OUT]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.training import GUIDED, IMAGE_HOSTS, SPEED, VIDEO_HOSTS
from benchmarks.speed import draw_cost, latent_reading, sampling_calls
from benchmarks.speed.sampling_calls import Distances
from benchmarks.speed.training_steps import OURS, Case, Comparison, compare
from benchmarks.spread import Spread

# Other programs do not stretch processor time. But it counts waiting threads too, so use it with one thread.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# Each case with its floor: the least ratio to every peer that it should have.
IMAGE_CASES = ((Case("DiT-S/2", 8, 32), 1.0), (Case("DiT-B/4", 8, 32), 1.0), (Case("DiT-S/8", 32, 32), 1.1))
# Videos of 8 frames with 64 tokens each.
VIDEO_CASE = Case("Latte-S/2", 2, 16, num_frames=8)
BATCH_SIZES = (8, 32)
# Share of a step that its draw may take.
DRAW_LIMIT = 0.01


@dataclass(frozen=True)
class Options:
    """The folder of the checkouts, the rounds (>= 1) of each long timing, and the clock of the steps.

    `with_compiled` adds our trainer a second time, with `compile: true`. Peers never compile.
    """

    hosts: Path
    rounds: int
    clock: str
    with_compiled: bool = False
    repetitions: int = 1000
    training_steps: int = 1600
    num_samples: int = 500
    num_noises: int = 5


@dataclass(frozen=True)
class Part:
    """A measured part: a text to read, and plain values for JSON."""

    text: str
    values: Mapping[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each part when it is done. With --json it also writes all values."""
    arguments = _arguments(argv)
    torch.set_num_threads(arguments.threads)
    options = Options(arguments.hosts, arguments.rounds, arguments.clock, with_compiled=arguments.compile)
    machine = (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}, "
        f"{arguments.threads} threads, {arguments.clock} time of steps, {arguments.rounds} rounds"
    )
    print(machine)
    for name, checkout in _missing(arguments.hosts).items():
        print(f"left out: {name}, no checkout {checkout} in {arguments.hosts}")
    values: dict[str, Any] = {"machine": machine}
    for name in PARTS:
        if name in arguments.only:
            part = PARTS[name](options, values)
            values[name] = part.values
            print(f"\n{part.text}", flush=True)
            if arguments.json is not None:
                # Written after each part, so that results stay if a later part fails.
                arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def measure_steps(options: Options, done: Mapping[str, Any]) -> Part:
    """The three image shapes and the video shape, each against the hosts whose checkout is there."""
    texts, values = [], {}
    for case, floor in (*IMAGE_CASES, (VIDEO_CASE, None)):
        known = VIDEO_HOSTS if case.num_frames else IMAGE_HOSTS
        hosts = [host for host in known if host.is_in(options.hosts)]
        if hosts:
            clock = CLOCKS[options.clock]
            found = compare(
                case, hosts, options.hosts, options.rounds, clock=clock, with_compiled=options.with_compiled
            )
            texts.append(steps_table(found, floor))
            values[case.model] = steps_values(found)
    return Part("\n\n".join(texts) or "steps: left out, no checkout", values)


def steps_table(found: Comparison, floor: float | None, peak: float | None = None) -> str:
    """A row per side: seconds, samples per second, ratios with quartiles, and the split in milliseconds.

    On CUDA also the peak memory, and with the device's `peak` in FLOP/s the MFU.
    """
    extra = _extra_cells(found, peak)
    heads = ["", "step", "samples/s", *(f"over {name}" for name in found.ours), *extra]
    heads += found.sides[OURS].split()
    lines = [f"{found.case}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, steps in found.sides.items():
        seconds = Spread.of(steps.seconds)
        ratios = [found.ratio(name, over) for over in found.ours]
        cells = [
            name,
            f"{seconds.median:.3f} s",
            f"{found.case.batch / seconds.median:.2f}",
            *(f"{ratio.median:.3f} ({ratio.low:.3f}, {ratio.high:.3f})" for ratio in ratios),
            *(cell(name) for cell in extra.values()),
            *(f"{1000 * value:.2f}" for value in steps.split().values()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name in found.ours if floor is not None else ():
        least, peer = found.least_ratio(name)
        verdict = "held" if least >= floor else "missed"
        lines += ["", f"Floor {floor:.1f}: {verdict} by {name}, {least:.3f} against {peer}."]
    return "\n".join([*lines, "", "Ratios are medians, quartiles behind; the split is in milliseconds."])


def _extra_cells(found: Comparison, peak: float | None) -> dict[str, Callable[[str], str]]:
    """Heads of the columns that a CPU does not have, with what makes a side's cell."""
    extra: dict[str, Callable[[str], str]] = {}
    if found.peaks:
        extra["peak memory"] = lambda name: f"{found.peaks[name] / 2**30:.2f} GiB"
    if peak is not None:
        extra["MFU"] = lambda name: f"{100 * found.mfu(name, peak):.1f} %"
    return extra


def steps_values(found: Comparison) -> dict[str, Any]:
    """By side: the seconds of all rounds, the medians of the split, and the ratios."""
    return {
        "case": asdict(found.case),
        "setting": str(found.setting),
        "peak_bytes": dict(found.peaks),
        "sides": {
            name: {
                "seconds": steps.seconds,
                "split": steps.split(),
                "ratios": {over: asdict(found.ratio(name, over)) for over in found.ours},
            }
            for name, steps in found.sides.items()
        },
    }


def measure_draw(options: Options, done: Mapping[str, Any]) -> Part:
    """Each sampler's draw; also our draw's share of our steps, if the steps were measured before."""
    found = draw_cost.measure(options.hosts, BATCH_SIZES, options.repetitions)
    text, shares = draw_table(found), draw_shares(done.get("steps", {}))
    if shares:
        worst = max(shares.values())
        listed = ", ".join(f"{name} {100 * share:.3f} %" for name, share in shares.items())
        verdict = "held" if worst <= DRAW_LIMIT else "missed"
        text += f"\n\nShare of our step: {listed}. Limit {100 * DRAW_LIMIT:g} %: {verdict}."
    draws = {
        str(batch): {name: asdict(spread) for name, spread in row.items()} for batch, row in found.items()
    }
    return Part(text, {"seconds": draws, "shares": shares})


def draw_table(found: Mapping[int, Mapping[str, Spread]]) -> str:
    """A row per sampler: microseconds by batch size, and the ratio to our `speed`."""
    heads = [f"batch {batch} | ratio to ours: speed" for batch in found]
    lines = [f"| sampler | {' | '.join(heads)} |", "|---" * (1 + 2 * len(found)) + "|"]
    for name in next(iter(found.values())):
        cells = [
            f"{1e6 * row[name].median:.0f} us | {row[name].median / row['ours: speed'].median:.2f}"
            for row in found.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_shares(steps: Mapping[str, Any]) -> dict[str, float]:
    """Our median draw over our median step, by model. The draw is timed within the step."""
    sides = {name: values["sides"][OURS] for name, values in steps.items()}
    return {name: side["split"]["draw"] / Spread.of(side["seconds"]).median for name, side in sides.items()}


def measure_sampling(options: Options, done: Mapping[str, Any]) -> Part:
    """Compares our samplers with the SpeeD reference's, so it needs the reference's checkout."""
    if not (options.hosts / SPEED).is_dir():
        return Part(f"sampling: left out, no checkout {SPEED}", {})
    found = sampling_calls.measure(
        options.hosts,
        num_steps=options.training_steps,
        num_samples=options.num_samples,
        num_noises=options.num_noises,
    )
    fewest = {kind: found.fewest(kind) for kind in found.ours}
    return Part(sampling_table(found), {**asdict(found), "level": found.level, "fewest": fewest})


def sampling_table(found: Distances) -> str:
    """Distances by sampler and calls, and the fewest calls that reach the reference's level."""
    lines = ["| sampler | calls | distance | standard deviation | seconds |", "|---|---|---|---|---|"]
    rows = [
        (
            sampling_calls.REFERENCE,
            "SpeeD reference, ancestral",
            sampling_calls.REFERENCE_CALLS,
            found.reference,
        )
    ]
    for kind, tried in found.ours.items():
        rows += [(f"{kind}-{calls}", f"ours: {kind}", calls, values) for calls, values in tried.items()]
    for key, name, calls, values in rows:
        distance = f"{statistics.mean(values):.2f} | {statistics.stdev(values):.2f}"
        taken = f"{found.seconds[key]:.3f}" if key in found.seconds else ""
        lines.append(f"| {name} | {calls} | {distance} | {taken} |")
    lines.append("")
    for kind in found.ours:
        fewest = found.fewest(kind)
        told = "no number tried"
        if fewest is not None:
            told = f"{fewest} calls, {sampling_calls.REFERENCE_CALLS / fewest:.1f} times fewer"
        lines.append(f"{kind}: at the reference's level, {found.level:.2f}, with {told}.")
    return "\n".join(lines)


def measure_latents(options: Options, done: Mapping[str, Any]) -> Part:
    """Batches of 8 images of 64 pixels."""
    found = latent_reading.measure(image_size=64, batch=8, rounds=options.rounds)
    images, cache = Spread.of(found.timings.host), Spread.of(found.timings.ours)
    # In these timings the cache is the side `ours`. `Timings` has its ratio the other way round.
    ratio = Spread.of([a / b for a, b in zip(found.timings.host, found.timings.ours, strict=True)])
    text = (
        f"A batch of {found.batch} images of {found.image_size} pixels: decoded and encoded "
        f"{images.median:.3f} s, from the latent cache {1000 * cache.median:.2f} ms, "
        f"ratio {ratio.median:.0f} ({ratio.low:.0f}, {ratio.high:.0f})."
    )
    return Part(text, {**asdict(found), "ratio": asdict(ratio)})


PARTS: dict[str, Callable[[Options, Mapping[str, Any]], Part]] = {
    "steps": measure_steps,
    "draw": measure_draw,
    "sampling": measure_sampling,
    "latents": measure_latents,
}


def _missing(hosts: Path) -> dict[str, str]:
    """Peers whose checkout is not in the folder: their names and checkouts."""
    peers = {host.name: host.checkout for host in (*IMAGE_HOSTS, *VIDEO_HOSTS)}
    peers["guided-diffusion"] = GUIDED
    return {name: checkout for name, checkout in peers.items() if not (hosts / checkout).is_dir()}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hosts", type=Path, required=True, help="folder of checkouts named owner+name")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--clock", choices=sorted(CLOCKS), default="wall", help="clock of the steps; cpu needs one thread"
    )
    parser.add_argument("--compile", action="store_true", help="also time ours with `compile: true` (steps)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="parts to run")
    parser.add_argument("--json", type=Path, help="also write all values here")
    arguments = parser.parse_args(argv)
    # Checked before the minutes of measuring, not after.
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error(
            f"wanted rounds and threads >= 1, got --rounds {arguments.rounds} --threads {arguments.threads}"
        )
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error(f"--clock cpu counts waiting threads: wanted --threads 1, got {arguments.threads}")
    if arguments.compile and "steps" not in arguments.only:
        parser.error(f"--compile is of steps, got --only {' '.join(arguments.only)}")
    if not arguments.hosts.is_dir():
        parser.error(f"--hosts needs an existing folder, got {arguments.hosts}")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"--json needs an existing folder, got {arguments.json.parent}")
    return arguments


if __name__ == "__main__":
    main()
