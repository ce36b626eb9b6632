"""The race: seconds of training until samples are as good as those at the end of a peer's own training.

Contestants are facebookresearch/DiT, fast-DiT, the SpeeD reference, MDT, SiT, REPA and LightningDiT, each as
its authors ship it, and ours of ours.yaml. They train models of as many parameters on the same images,
take turns on one machine, and are evaluated alike. A peer keeps its model, losses, optimizer, clipping and
draw. Its learning rate and average are made for hundreds of thousands of steps, so both are shortened for
everybody: learning rates times a factor, averages to a twentieth of the steps. With several factors a peer is
judged by its best one.

    python -m benchmarks.race --hosts DIR --data-dir DIR [--steps 1200] [--out outputs/race]
    python -m benchmarks.race --hosts DIR --data-dir DIR --device cuda --minutes 8
    python -m benchmarks.race --hosts DIR --data-dir DIR --rows benchmarks/race/parts.yaml
    python -m benchmarks.race --report [--out outputs/race]

--hosts holds checkouts named owner+name, as benchmarks/race/hosts.py lists them; a peer without one is left
out, and the output names it. --data-dir holds Fashion-MNIST, see benchmarks/flow/sets.py. A run that was
stopped goes on where it was, with the same command. The folder --out gets results.jsonl, report.md, race.png.
"""

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.flow.sets import fashion
from benchmarks.image_sets import ImageSet, load_image_set
from benchmarks.race.hosts import PEERS, Peer
from benchmarks.race.laps import PEERS_EVALUATED, Entry, Plan, paces, race, read_laps, results_file
from benchmarks.race.ours import ROWS, OurTraining, check_config, read_rows, row_of
from benchmarks.race.plots import save_figure
from benchmarks.race.quality import Measure, Quality
from benchmarks.race.report import report
from benchmarks.race.training import Net, Terms, Training, count_parameters
from benchmarks.results_file import check_exists, revision
from speedit_plugins.registry import nearest

# The average forgets half in this share of the steps.
EMA_SHARE = 1 / 20
# Steps of the trainings that are timed for --minutes; they make the first few.
PROVISIONAL_STEPS = 10_000
# Share of --minutes that is planned: the rest is for what takes longer than it did when it was measured.
PLANNED = 0.85


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a line per evaluation, and the report at the end."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    arguments.started = time.perf_counter()
    try:
        _check(arguments)
        if not arguments.report:
            torch.set_num_threads(arguments.threads)
            _run(arguments)
        laps = read_laps(arguments.out)
        text = report(laps)
        (arguments.out / "report.md").write_text(text + "\n", encoding="utf-8")
        print(f"\n{text}\n\n{save_figure(laps, arguments.out / 'race.png')}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _run(arguments: argparse.Namespace) -> None:
    data = load_data(arguments.data, arguments.data_dir, arguments.image_size)
    net = Net(
        arguments.image_size,
        data.images.shape[1],
        data.num_classes,
        arguments.width,
        arguments.depth,
        arguments.heads,
        arguments.patch_size,
    )
    peers = _peers(arguments)
    if arguments.minutes:
        # The first run of a race decides; one that goes on keeps its steps.
        arguments.steps = _steps_of(arguments.out) or PROVISIONAL_STEPS
    _check_ours(arguments, net)
    measure = Quality(
        data,
        num_samples=arguments.num_samples,
        num_calls=arguments.calls,
        folder=arguments.out,
        device=arguments.device,
    ).distances
    if arguments.minutes and _steps_of(arguments.out) is None:
        arguments.steps = _steps_that_fit(arguments, peers, net, data, measure)
        _check_ours(arguments, net)
    settings = _settings(arguments, net)
    read_laps(arguments.out, settings)
    run = f"{time.strftime('%Y-%m-%d %H:%M:%S')}, {revision()}"
    plan = Plan(arguments.steps, settings, run, arguments.turns, arguments.device)
    race(_entries(arguments, peers, net, data), plan, measure, arguments.out, say=_say)


def load_data(name: str, folder: Path, image_size: int) -> ImageSet:
    """Fashion-MNIST of the folder, or the embedded digits, at this size; both have ten classes."""
    return load_image_set("digits", image_size) if name == "digits" else fashion(folder, image_size)


def _entries(arguments: argparse.Namespace, peers: Sequence[Peer], net: Net, data: ImageSet) -> list[Entry]:
    """Every training: peers with each factor, ours with the first one, each with every seed."""
    rows, entries = read_rows(arguments.rows), []
    for seed in arguments.seeds:
        for name in arguments.ours or rows:
            terms = _terms(arguments, seed, arguments.lr_factors[0])
            build = partial(_build_ours, row_of(name, rows), net, data, terms, arguments.out / "state")
            entries.append(Entry(name, name, seed, partial(build, f"{_plain(name)}-{seed}")))
        for peer in peers:
            matched = peer.matched(arguments.hosts, net, _num_parameters(net))
            for factor in arguments.lr_factors:
                name = peer.name + f" x{factor:g}" * (len(arguments.lr_factors) > 1)
                terms = _terms(arguments, seed, factor)
                build = partial(peer.train, arguments.hosts, matched, data, terms)
                entries.append(Entry(name, peer.name, seed, build, PEERS_EVALUATED))
    return entries


def _check_ours(arguments: argparse.Namespace, net: Net) -> None:
    """Raises ValueError, before anything is trained, if a config of ours does not fit the race."""
    rows = read_rows(arguments.rows)
    for name in arguments.ours or rows:
        check_config(name, row_of(name, rows), net, _terms(arguments, 0, arguments.lr_factors[0]))


def _build_ours(
    row: dict[str, Any], net: Net, data: ImageSet, terms: Terms, folder: Path, name: str
) -> Training:
    return OurTraining(row, net, data, terms, folder / name / "run")


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _num_parameters(net: Net) -> int:
    """Parameters of DiT, and so of ours."""
    from speedit_plugins.trainer.models.dit import DiT

    model = DiT(
        input_size=net.image_size,
        patch_size=net.patch_size,
        in_channels=net.channels,
        hidden_size=net.width,
        depth=net.depth,
        num_heads=net.num_heads,
        num_classes=net.num_classes,
    )
    return count_parameters(model)[0]


def _terms(arguments: argparse.Namespace, seed: int, lr_factor: float) -> Terms:
    return Terms(
        arguments.batch_size,
        lr_factor,
        max(1.0, EMA_SHARE * arguments.steps),
        arguments.steps,
        seed,
        arguments.device,
    )


def _settings(arguments: argparse.Namespace, net: Net) -> dict[str, Any]:
    """What has to be the same in all lines of a race."""
    return {
        "data": arguments.data,
        "image_size": net.image_size,
        "width": net.width,
        "depth": net.depth,
        "heads": net.num_heads,
        "patch_size": net.patch_size,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "num_samples": arguments.num_samples,
        "calls": arguments.calls,
        "device": arguments.device,
        "threads": arguments.threads,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}",
    }


def _steps_of(out: Path) -> int | None:
    """Steps of the race in the folder; None if it has not begun."""
    laps = read_laps(out)
    return laps[0].settings["steps"] if laps else None


def _steps_that_fit(
    arguments: argparse.Namespace, peers: Sequence[Peer], net: Net, data: ImageSet, measure: Measure
) -> int:
    """Steps with which the whole race takes `--minutes`, from a few steps and one evaluation of each kind."""
    entries = _entries(arguments, peers, net, data)
    found = paces(entries, arguments.device)
    began = time.perf_counter()
    measure(entries[0].build(), 0)
    num_evaluations = sum(len(entry.evaluated) for entry in entries)
    evaluations = (time.perf_counter() - began) * num_evaluations
    gone = time.perf_counter() - arguments.started
    left = PLANNED * 60 * arguments.minutes - gone - sum(setup for setup, _ in found.values()) - evaluations
    steps = int(left / sum(step for _, step in found.values()))
    if steps < 100:
        raise ValueError(
            f"--minutes {arguments.minutes:g} leaves {left:.0f} s of training for {len(entries)} contestants,"
            f" {max(0, steps)} steps each; wanted 100: give more minutes, fewer --peers, or --steps"
        )
    _say(f"{steps} steps fit into {arguments.minutes:g} minutes")
    return steps


def _peers(arguments: argparse.Namespace) -> list[Peer]:
    known = {peer.name: peer for peer in PEERS}
    for name in arguments.peers or ():
        if name not in known:
            raise ValueError(f"unknown peer {name!r}{nearest(name, known)}; known: {', '.join(known)}")
    wanted = [known[name] for name in arguments.peers or known]
    found = []
    for peer in wanted:
        missing = peer.missing(arguments.hosts)
        if missing:
            print(f"left out: {peer.name}, no checkout {', '.join(missing)} in {arguments.hosts}")
        else:
            found.append(peer)
    return found


def _check(arguments: argparse.Namespace) -> None:
    if arguments.report:
        check_exists(results_file(arguments.out))
        return
    if arguments.hosts is None:
        raise ValueError(
            "--hosts needs the folder of the checkouts, got none, and SPEEDIT_HOSTS is not set; its folders"
            " are named owner+name, as benchmarks/race/hosts.py lists them"
        )
    if not arguments.hosts.is_dir():
        raise ValueError(f"--hosts needs the folder of the checkouts, got {arguments.hosts}")
    least = {"steps": 40, "num_samples": 100, "threads": 1, "batch_size": 1, "turns": 1}
    for name, value in least.items():
        if getattr(arguments, name) < value:
            given = name.replace("_", "-")
            raise ValueError(f"--{given} needs to be >= {value}, got {getattr(arguments, name)}")
    if arguments.image_size % arguments.patch_size or arguments.image_size // arguments.patch_size < 2:
        got = f"{arguments.image_size} and {arguments.patch_size}"
        raise ValueError(f"--image-size needs to be a multiple, twice or more, of --patch-size, got {got}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA device, and torch sees none")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.race",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    hosts = os.environ.get("SPEEDIT_HOSTS")
    add("--hosts", type=Path, default=hosts and Path(hosts), help="checkouts; $SPEEDIT_HOSTS if left out")
    add("--data", choices=("fashion", "digits"), default="fashion", help="digits are embedded, and small")
    add("--data-dir", type=Path, default=Path("outputs/flow/data"), help="see benchmarks/flow/sets.py")
    add("--out", type=Path, default=Path("outputs/race"), help="folder of results and states")
    add("--report", action="store_true", help="print what the results say, and train nothing")
    add("--peers", nargs="+", help="of " + ", ".join(peer.name for peer in PEERS))
    add("--rows", type=Path, default=ROWS, help="our contestants, in the form of ours.yaml")
    add("--ours", nargs="+", help="names of those that take part; all if left out")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", type=int, default=1200, help="of each training")
    add("--minutes", type=float, default=0.0, help="takes as many steps as fit into these")
    add("--lr-factors", nargs="+", type=float, default=[10.0], help="of peers' rates; ours take the first")
    add("--batch-size", type=int, default=32)
    add("--image-size", type=int, default=32)
    add("--patch-size", type=int, default=4)
    add("--width", type=int, default=128)
    add("--depth", type=int, default=6)
    add("--heads", type=int, default=4)
    add("--num-samples", type=int, default=500, help="of each distance")
    add("--calls", type=int, default=25, help="of the model for each sample; odd")
    add("--turns", type=int, default=40, help="of each contestant")
    add("--threads", type=int, default=2, help="of the CPU")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
