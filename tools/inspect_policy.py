"""Shows what timestep policies do on a noise schedule, in numbers, words and a plot.

    python tools/inspect_policy.py --policy speedit speed uniform --schedule linear --timesteps 1000 \\
        --json out.json --plot out.png
    python tools/inspect_policy.py --policy auto --host sd-scripts --timestep_sampling sigmoid --plot out.png

`--host` draws the law of another trainer. Its flags follow, as that trainer calls them, and end at the next
option of this command.

Dims: T timesteps.
"""

import argparse
import json
import math
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from host_flags import host_configs, split_hosts, value_of
from policy_pictures.figure import save_figure
from policy_pictures.tables import AREAS, QUARTILES, areas, describe

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.files import write_whole
from speedit_plugins.hosts.laws.laws import HOSTS
from speedit_plugins.policies.schedule import PREDICTION_TYPES
from speedit_plugins.policies.spectrum import DataSpectrum
from speedit_plugins.policies.weightings.loss_normalized import LossNormalizedPolicy
from speedit_plugins.registry import import_modules

SCHEDULES: dict[str, Callable[..., NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "scaled_linear": NoiseSchedule.scaled_linear,
    "cosine": NoiseSchedule.cosine,
    "rectified_flow": NoiseSchedule.rectified_flow,
}

_CLEANER = "u, and log-SNR in brackets, below which this share of the draws is cleaner"
# Share of the draws at either end that the panels over log-SNR may leave out.
_UNSEEN = 0.005


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    try:
        own = set(re.findall(r"--[a-z-]+", _parser().format_usage()))
        words, blocks = split_hosts(sys.argv[1:] if argv is None else argv, own)
        args = _parser().parse_args(words)
        import_modules(args.imports, source="--import")
        args.schedule = args.schedule or ("rectified_flow" if blocks else "linear")
        schedule = SCHEDULES[args.schedule](args.timesteps)
        if blocks and args.schedule != "rectified_flow":
            raise ValueError(f"--host needs --schedule rectified_flow, got {args.schedule}")
        hosts = host_configs(blocks)
        configs = {**_configs(args), **hosts}
        if not configs:
            raise ValueError("needs --policy NAME or --host NAME (--help lists the options)")
        # Warnings about a policy are printed in the report, without a source line.
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            policies = {
                title: _built(title, config, schedule, args, args.step) for title, config in configs.items()
            }
            changing = [title for title, config in configs.items() if _changes(title, config, schedule, args)]
        report = describe(schedule, policies)
        print(summary(args.schedule, schedule, report))
        for title, config in hosts.items():
            print(f"{title} is the policy\n  {_as_line(config)}")
        for line in dict.fromkeys(str(note.message) for note in notes):
            print(_wrap(f"Note: {line}."))
        state = "its initial state" if args.step is None else f"its state at step {args.step}"
        for title in changing:
            print(_wrap(f"Note: {title} changes during training; shown is {state}."))
        _write(args, schedule, {title: {**row, "config": configs[title]} for title, row in report.items()})
    except ValueError as error:
        print(f"inspect_policy: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def gain(schedule: NoiseSchedule) -> str:
    """Explains how much skipping samples of the convergence area can save: T / tau for k -> infinity."""
    T, tau = schedule.num_timesteps, schedule.convergence_index()
    if tau in (0, T):
        which = "Every" if tau == 0 else "No"
        return f"{which} timestep has an SNR below 1/143, so drawing such timesteps less often gains nothing."
    ceiling = T / tau
    verdict = "almost nothing" if ceiling < 1.05 else "little" if ceiling < 1.15 else "a real saving"
    at_default = 5 * T / (T + 4 * tau)
    return (
        f"Gain from drawing fewer convergence samples: {verdict}. At most {ceiling:.4g}x, T / tau ="
        f" {T} / {tau}, if none of them are drawn (k -> infinity); {at_default:.4g}x at k = 5."
        " Larger gains must come from the weights or from a density that favours other timesteps."
    )


def summary(name: str, schedule: NoiseSchedule, report: dict[str, dict[str, Any]]) -> str:
    """The report for a terminal: the areas, one row per policy, and the possible gain."""
    lines = [f"Schedule {name}, T = {schedule.num_timesteps}"]
    for area, (first, end) in areas(schedule).items():
        if first == end:
            lines.append(f"  {area:<13} empty")
            continue
        snr = f"SNR {schedule.snr[first]:.3g} to {schedule.snr[end - 1]:.3g}"
        lines.append(f"  {area:<13}{first:>6} ..{end - 1:>6}  {snr}")
    width = max(len("policy"), *(len(policy) for policy in report))
    head = f"{'policy':<{width}}  boundary  mean weight   share of importance (draws) in %"
    columns = "".join(f"{area:>17}" for area in AREAS)
    lines += ["", head, " " * (width + 23) + columns]
    for policy, row in report.items():
        boundary = "-" if row["boundary_index"] is None else row["boundary_index"]
        shares = "".join(
            f"{100 * area['importance']:>9.1f} ({100 * area['draws']:>4.1f})"
            for area in row["areas"].values()
        )
        lines.append(f"{policy:<{width}}  {boundary:>8}  {row['mean_weight']:>11.4f} {shares}")
    lines += ["", f"{'':<{width}}  {_CLEANER}"]
    lines.append(f"{'policy':<{width}}  {'':>6}" + "".join(f"{100 * share:>15.0f} %" for share in QUARTILES))
    for policy, row in report.items():
        places = zip(row["quartiles"]["u"], row["quartiles"]["log_snr"], strict=True)
        cells = (f"{u:.3f} ({'-inf' if snr is None else f'{round(snr, 2) + 0.0:.2f}'})" for u, snr in places)
        lines.append(f"{policy:<{width}}  {'':>6}" + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join([*lines, "", _wrap(gain(schedule))])


def plot(path: Path, name: str, schedule: NoiseSchedule, report: dict[str, dict[str, Any]]) -> None:
    """Plots density, weight and importance against the timestep and against log-SNR; see `save_figure`."""
    T = schedule.num_timesteps

    def rows(*tables: tuple[str, float, str]) -> dict[str, dict[str, list[float | None]]]:
        return {
            label: {
                policy: [None if value is None else scale * value for value in row[table]]
                for policy, row in report.items()
            }
            for table, scale, label in tables
        }

    over_time = rows(
        ("density", T, "density\n(uniform = 1)"),
        ("weight", 1, "weight"),
        ("importance", T, "density × weight\n(normalised, uniform = 1)"),
    )
    over_log_snr = rows(
        ("density_over_log_snr", 1, "density\nper unit log-SNR"),
        ("weight", 1, "weight"),
        ("importance_over_log_snr", 1, "density × weight\nper unit log-SNR"),
    )
    title = f"Timestep policies on the {name.replace('_', ' ')} schedule, T = {T}"
    save_figure(path, title, schedule, over_time, over_log_snr, _shown_log_snr(report, schedule))


def _shown_log_snr(report: dict[str, dict[str, Any]], schedule: NoiseSchedule) -> tuple[float, float]:
    """The log-SNRs between which nearly all draws and all importance of every policy lie."""
    places = schedule.log_snr
    used = torch.zeros_like(places, dtype=torch.bool)
    for row in report.values():
        for table in (row["density"], row["importance"]):
            below = torch.tensor(table, dtype=torch.float64).cumsum(0)
            used |= (below > _UNSEEN) & (below < 1 - _UNSEEN)
    shown = places[used & places.isfinite()]
    if not len(shown):
        shown = places[places.isfinite()]
    return float(shown.min()), float(shown.max())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        write_whole(path, (json.dumps(content, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


def _write(args: argparse.Namespace, schedule: NoiseSchedule, report: dict[str, dict[str, Any]]) -> None:
    if args.plot is not None:
        plot(args.plot, args.schedule, schedule, report)
        print(f"plot: {args.plot}")
    if args.json is not None:
        write_json(args.json, report)
        print(f"tables: {args.json}")


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


_POLICY_HELP = "registered names, or mappings such as '{density: logit_normal, weighting: p2}'"
_HOST_HELP = (
    "a trainer whose law is drawn, followed by its own flags up to the next option of this command; may be"
    " given several times. Known: {}"
)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="inspect_policy", description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False
    )
    parser.add_argument("--policy", nargs="+", action="extend", default=[], metavar="NAME", help=_POLICY_HELP)
    # Its blocks are taken out before parsing.
    parser.add_argument(
        "--host", metavar="NAME", help=_HOST_HELP.format(", ".join(sorted(HOSTS.module_dict)))
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers policies or their parts; may be given several times",
    )
    parser.add_argument(
        "--schedule", choices=sorted(SCHEDULES), help="default: linear, or rectified_flow with --host"
    )
    parser.add_argument("--timesteps", type=int, default=1000, metavar="T")
    parser.add_argument(
        "--prediction-type",
        choices=PREDICTION_TYPES,
        help="what the model predicts (default: flow for rectified_flow, else epsilon)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="[POLICY.]KEY=VALUE",
        help="set a parameter of all policies, or of one",
    )
    parser.add_argument(
        "--data-shape", metavar="C,H,W", help="shape of a sample, for shifts by resolution: C,H,W or C,F,H,W"
    )
    parser.add_argument("--step", type=int, metavar="N", help="training steps done, for laws that change")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a plot to this file (.png, .svg, .pdf)"
    )
    return parser


def _configs(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    configs: dict[str, dict[str, Any]] = {}
    for text in args.policy:
        name, config = _named(text)
        if configs.setdefault(name, config) != config:
            # Another policy has the same name: use the text as typed to distinguish them.
            configs[text] = config
    for setting in args.set:
        names, key, value = _parse_setting(setting, list(configs))
        for name in names:
            configs[name][key] = value
    return configs


def _built(
    title: str, config: dict[str, Any], schedule: NoiseSchedule, args: argparse.Namespace, step: int | None
) -> TimestepPolicy:
    default = "flow" if args.schedule == "rectified_flow" else "epsilon"
    policy = build_policy(config, schedule, args.prediction_type or default, data_spectrum=_unit_variance)
    if args.data_shape is not None:
        policy.observe(torch.zeros(1, *_shape(args.data_shape)))
    elif policy.needs_data:
        raise ValueError(f"{title} depends on the size of the data: give --data-shape, such as 16,128,128")
    if step is not None:
        policy.advance(step)
    return policy


def _changes(title: str, config: dict[str, Any], schedule: NoiseSchedule, args: argparse.Namespace) -> bool:
    """Whether a policy follows the losses or the steps of the training."""
    first, last = (_built(title, config, schedule, args, step) for step in (0, 10**9))
    follows_losses = first.learns or isinstance(first, LossNormalizedPolicy)
    return follows_losses or not torch.equal(first.density, last.density)


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise ValueError(f"--data-shape needs sizes >= 1, such as 16,128,128, got {text!r}")
    return sizes


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """Name and config of a policy, given as a registered name or as a YAML mapping.

    A mapping is named after its type or its parts.
    """
    if not text.lstrip().startswith("{"):
        return text, {"type": text}
    try:
        config = dict(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"--policy needs a name or a YAML mapping, got {text!r}: {error}") from error
    parts = [config[key] for key in ("type", "density", "weighting") if key in config]
    names = [str(part.get("type")) if isinstance(part, dict) else str(part) for part in parts]
    return " x ".join(names), config


def _unit_variance() -> DataSpectrum:
    warnings.warn(
        "a policy without mean takes it from the data; shown is its state for data of variance 1",
        stacklevel=2,
    )
    return DataSpectrum(torch.ones(1))


def _parse_setting(setting: str, policies: list[str]) -> tuple[list[str], str, Any]:
    """The policies, the key and the value that a `[POLICY.]KEY=VALUE` sets."""
    target, equals, text = setting.partition("=")
    policy, dot, key = target.rpartition(".")
    if not equals or not key:
        raise ValueError(f"--set needs KEY=VALUE or POLICY.KEY=VALUE, got {setting!r}")
    if dot and policy not in policies:
        raise ValueError(f"--set {setting!r} needs one of the inspected policies: {', '.join(policies)}")
    return [policy] if dot else policies, key, value_of(text, f"--set {setting}")


def _as_line(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), default_flow_style=True, sort_keys=False, width=math.inf).strip()


def _wrap(text: str) -> str:
    return textwrap.fill(text, width=100)


if __name__ == "__main__":
    sys.exit(main())
