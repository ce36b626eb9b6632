"""How many training steps does a timestep policy save? Fréchet distance against step, paired over seeds.

Trains a small class-conditional DiT once per policy and seed, many trainings as one model with stacked
weights. The seed decides initialisation, data order and noise. At some steps the averaged weights draw
samples. Their Fréchet distance to the data, over the steps, is the curve of a training. The speed-up of a
policy at horizon S is S divided by the steps after which the policy reaches the distance that `uniform` has
at S with the same seed.

    python -m benchmarks.convergence [--policies speedit speed] [--seeds 0 1 2 3 4] [--full] [--out DIR]
        [--schedule linear rectified_flow]

Writes results.json, table.md, distance.png and speed_up.png; with several schedules, to a folder for each.
From Python, `run` trains members of any policy.
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from benchmarks.convergence.paired_run import BASELINE, Protocol, Results, run
from benchmarks.convergence.plots import draw
from benchmarks.convergence.policy_pace import paces
from benchmarks.convergence.report import Document, document, side_by_side, table
from benchmarks.image_sets import load_image_set
from benchmarks.stacked.training import SETTINGS, Member, Shape
from speedit_plugins.registry import POLICIES as REGISTERED

POLICIES = ("speedit", "speedit_reference", "speed", "spectral", "p2", "min_snr")
ALL_POLICIES = tuple(name for name in REGISTERED.module_dict if name != BASELINE)
SEEDS = tuple(range(5))
ALL_SEEDS = tuple(range(11))


def main() -> None:
    """Prints a line per evaluation of a stack, then the table of each sampler."""
    arguments, parser = _arguments()
    try:
        _compare(arguments)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _compare(arguments: argparse.Namespace) -> None:
    schedules = list(dict.fromkeys(arguments.schedule))
    folders = {name: arguments.out / name if len(schedules) > 1 else arguments.out for name in schedules}
    for folder in folders.values():
        try:
            # Checked before the minutes of training, not after.
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out needs a folder, got {folder}: {error.strerror}") from error
    found = {name: _compare_on(name, arguments, folder) for name, folder in folders.items()}
    if len(schedules) > 1:
        print(f"\n{side_by_side(found)}")


def _compare_on(schedule: str, arguments: argparse.Namespace, folder: Path) -> Document:
    protocol, members = _protocol(schedule, arguments), _members(schedule, arguments)
    results = run(members, protocol, say=lambda text: print(text, flush=True))
    one_each = [member for member in members if member.seed == members[0].seed]
    data = load_image_set(protocol.data, protocol.image_size)
    found = document(
        results,
        paces(one_each, data, protocol.schedule, protocol.shape),
        command=shlex.join(["python", "-m", "benchmarks.convergence", *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
    )
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    parts = [table(found, sampler) for sampler in protocol.samplers]
    if arguments.normalise_loss:
        parts += [_over_normalised(results, sampler) for sampler in protocol.samplers]
    tables = "\n\n".join(parts)
    (folder / "table.md").write_text(tables + "\n", encoding="utf-8")
    print(f"\n{tables}\n\n{results.seconds:.0f} s; results.json and table.md lie in {folder}")
    for path in draw(found, folder):
        print(f"  {path}")
    return found


def _members(schedule: str, arguments: argparse.Namespace) -> list[Member]:
    return [
        Member(
            policy,
            seed,
            lr=arguments.lr,
            prediction_type=arguments.prediction or SETTINGS[schedule].prediction_type,
            label=name,
        )
        for name, policy in _policies(arguments).items()
        for seed in arguments.seeds
    ]


def _policies(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Table row -> policy. With --normalise-loss each policy has a second row, with its losses normalised."""
    plain: dict[str, dict[str, Any]] = {}
    for name in (BASELINE, *arguments.policies):
        # The default, 50,000 steps, is an eighth of the 400,000 at which DiT-XL/2 is compared.
        options = {"curriculum_steps": max(1, arguments.horizon // 8)} if name == "clts" else {}
        plain[name] = {"type": name, **options}
    if not arguments.normalise_loss:
        return plain
    return plain | {_normalised(name): {**policy, "normalize": "loss"} for name, policy in plain.items()}


def _normalised(name: str) -> str:
    return f"{name} / loss"


def _over_normalised(results: Results, sampler: str) -> str:
    """The speed-ups of the normalised rows over the baseline that is normalised too."""
    baseline = _normalised(BASELINE)
    lines = [f"Over {baseline!r} in place of {BASELINE!r}, {sampler}:"]
    for name in results.names():
        if name.endswith(_normalised("")) and name != baseline:
            found = results.summary(name, baseline=baseline, sampler=sampler)
            lines.append(f"  {name}: {found.bound}{found.mean:.2f} ({found.low:.2f}, {found.high:.2f})")
    return "\n".join(lines)


def _protocol(schedule: str, arguments: argparse.Namespace) -> Protocol:
    samplers = arguments.samplers or [SETTINGS[schedule].sampler]
    if arguments.no_clamp:
        samplers = [name if name.endswith("-unclamped") else f"{name}-unclamped" for name in samplers]
    return Protocol(
        horizon=arguments.horizon,
        steps=tuple(arguments.steps),
        samplers=tuple(dict.fromkeys(samplers)),
        num_samples=arguments.num_samples,
        features=arguments.features,
        data=arguments.data,
        image_size=arguments.image_size,
        schedule=schedule,
        shape=Shape(
            width=arguments.width,
            depth=arguments.depth,
            num_heads=arguments.heads,
            patch_size=arguments.patch,
            batch_size=arguments.batch_size,
        ),
        workers=arguments.workers,
    )


class _Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of the module's text, and adds each option's default."""


def _arguments() -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence", description=__doc__, formatter_class=_Formatter
    )
    add = parser.add_argument
    add("--policies", nargs="+", help=f"policies beside {BASELINE}; if not given: {' '.join(POLICIES)}")
    add("--seeds", nargs="+", type=int, help="if not given: 0 to 4")
    add("--full", action="store_true", help="every registered policy, seeds 0 to 10")
    add(
        "--horizon",
        type=int,
        default=Protocol.horizon,
        help="distance to reach: the baseline's at this step",
    )
    add(
        "--steps",
        nargs="+",
        type=int,
        default=(),
        help="of the evaluations; (): 8 up to 1.25 of the horizon",
    )
    add("--samplers", nargs="+", help="ddim-25, ancestral-100, dpm-10; for a flow euler-25, heun-13")
    add("--no-clamp", action="store_true", help="the samplers do not clamp x_0")
    add("--num-samples", type=int, default=Protocol.num_samples, help="samples at each evaluation")
    add("--features", default=Protocol.features, help="entry of FEATURES, such as pixels@8 without labels")
    add(
        "--data", default=Protocol.data, help="digits, an .npz, *-images-idx3-ubyte.gz, or a folder of images"
    )
    add("--image-size", type=int, default=Protocol.image_size, help="images are scaled down to it, in pixels")
    add(
        "--schedule",
        nargs="+",
        default=[Protocol.schedule],
        choices=list(SETTINGS),
        help="noise schedules, one run after the other",
    )
    add("--prediction", help="epsilon, x0 or v; if not given: epsilon, flow on a rectified flow")
    add("--lr", type=float, default=Member.lr, help="learning rate of AdamW")
    add("--normalise-loss", action="store_true", help="each policy a second time, with normalize=loss")
    add("--width", type=int, default=Shape.width, help="of the model")
    add("--depth", type=int, default=Shape.depth, help="blocks of the model")
    add("--heads", type=int, default=Shape.num_heads, help="of each attention")
    add("--patch", type=int, default=Shape.patch_size, help="pixels")
    add("--batch-size", type=int, default=Shape.batch_size, help="images of a step")
    add(
        "--workers",
        type=int,
        default=0,
        help="stacks that train at once; 0: as many as torch has threads",
    )
    add("--out", type=Path, default=Path("outputs/convergence"), help="folder for the results")
    arguments = parser.parse_args()
    if len(set(arguments.seeds or ())) < len(arguments.seeds or ()):
        parser.error(f"--seeds needs each once, got {' '.join(map(str, arguments.seeds))}")
    if arguments.full and (arguments.policies or arguments.seeds):
        parser.error("--full sets policies and seeds: it takes no --policies and no --seeds")
    arguments.policies = arguments.policies or (ALL_POLICIES if arguments.full else POLICIES)
    arguments.seeds = arguments.seeds or (ALL_SEEDS if arguments.full else SEEDS)
    return arguments, parser


if __name__ == "__main__":
    main()
