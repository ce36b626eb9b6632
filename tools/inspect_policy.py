"""Shows what a timestep policy does on a noise schedule, in numbers, words and a plot.

    python tools/inspect_policy.py --policy speedit speed uniform --schedule linear --timesteps 1000 \\
        --json out.json --plot out.png

Dims: T timesteps.
"""

import argparse
import contextlib
import json
import math
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from torch import Tensor

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.files import write_whole
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
# Label of the y-axis -> name of a line -> the line's value at each timestep.
Panels = Mapping[str, Mapping[str, Sequence[float | None]]]

AREAS = ("acceleration", "deceleration", "convergence")
AREA_COLORS = ("#e8eef7", "#f7f7f7", "#fbeee3")
# Okabe and Ito's palette, distinguishable with any kind of colour vision.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 or, after an error message on stderr, 2."""
    try:
        args = _parser().parse_args(argv)
        import_modules(args.imports, source="--import")
        # Warnings about a policy are printed in the report, without a source line.
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always", UserWarning)
            schedule, policies = _build(args)
        report = describe(schedule, policies)
        print(summary(args.schedule, schedule, report))
        for line in dict.fromkeys(str(note.message) for note in notes):
            print(_wrap(f"Note: {line}."))
        for name in (name for name, policy in policies.items() if _follows_training(policy)):
            print(_wrap(f"Note: {name} changes during training; shown is its initial state."))
        if args.plot is not None:
            plot(args.plot, args.schedule, schedule, report)
            print(f"plot: {args.plot}")
        if args.json is not None:
            write_json(args.json, report)
            print(f"tables: {args.json}")
    except ValueError as error:
        print(f"inspect_policy: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def describe(schedule: NoiseSchedule, policies: dict[str, TimestepPolicy]) -> dict[str, dict[str, Any]]:
    """Tables and area shares of each policy, as plain values for JSON.

    Returns:
        Per policy: density, weight and importance (density * weight, normalised), each a list of T numbers;
        boundary_index, mean_weight and scope; and per area of the schedule its range [first, end), its share
        of the draws and its share of the importance.
    """
    return {name: _describe_one(schedule, policy) for name, policy in policies.items()}


def areas(schedule: NoiseSchedule) -> dict[str, tuple[int, int]]:
    """[first, end) indices of the three areas; the last one is empty if no SNR is below 1/143."""
    convergence = schedule.convergence_index()
    acceleration = min(schedule.acceleration_index, convergence)
    edges = (0, acceleration, convergence, schedule.num_timesteps)
    return {name: (edges[i], edges[i + 1]) for i, name in enumerate(AREAS)}


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
    return "\n".join([*lines, "", _wrap(gain(schedule))])


def plot(path: Path, name: str, schedule: NoiseSchedule, report: dict[str, dict[str, Any]]) -> None:
    """Plots density, weight and importance against the timestep; see `save_figure`."""
    T = schedule.num_timesteps
    rows = (
        ("density", T, "density\n(uniform = 1)"),
        ("weight", 1, "weight"),
        ("importance", T, "density × weight\n(normalised, uniform = 1)"),
    )
    panels = {
        label: {policy: [scale * value for value in row[table]] for policy, row in report.items()}
        for table, scale, label in rows
    }
    title = f"Timestep policies on the {name.replace('_', ' ')} schedule, T = {T}"
    save_figure(path, title, schedule, panels)


def save_figure(path: Path, title: str, schedule: NoiseSchedule, panels: Panels) -> None:
    """Writes a figure with one panel above the other, all against the timestep, with shaded schedule areas.

    Args:
        path: the file; its suffix decides the format.
        title: title of the figure.
        schedule: decides the shaded areas.
        panels: lines by name for each y-axis label; a line has one value per timestep, None for a gap.

    Raises:
        ValueError: the file cannot be written, or matplotlib does not support its format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    T, height = schedule.num_timesteps, 1 + 2.5 * len(panels)
    figure, axes = plt.subplots(len(panels), 1, figsize=(9, height), sharex=True, layout="constrained")
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for i, (line, values) in enumerate(lines.items()):
            drawn = [math.nan if value is None else value for value in values]
            axis.plot(drawn, color=LINE_COLORS[i % len(LINE_COLORS)], **_line_style(i), label=line)
        _dress(axis, schedule, label)
    _name_areas(axes[0], schedule)
    axes[-1].set_xlabel("timestep index t  (0 is clean, T is noise)")
    axes[-1].set_xlim(0, T)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    handles, labels = axes[0].get_legend_handles_labels()
    # About a hundred letters of this size fit into the width of the figure, including the legend's keys.
    labels = [textwrap.fill(label, 88) for label in labels]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = len(labels) if len(labels) <= 4 else min(4, math.ceil(len(labels) / 2))
    columns = max(1, min(columns, 100 // (longest + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    finally:
        plt.close(figure)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        write_whole(path, (json.dumps(content, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (--help lists the options)")


_POLICY_HELP = "registered names, or mappings such as '{density: logit_normal, weighting: p2}'"


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="inspect_policy", description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--policy", nargs="+", required=True, metavar="NAME", help=_POLICY_HELP)
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers policies or their parts; may be given several times",
    )
    parser.add_argument("--schedule", choices=sorted(SCHEDULES), default="linear")
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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to this file")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="write a plot to this file (.png, .svg, .pdf)"
    )
    return parser


def _build(args: argparse.Namespace) -> tuple[NoiseSchedule, dict[str, TimestepPolicy]]:
    schedule = SCHEDULES[args.schedule](args.timesteps)
    default = "flow" if args.schedule == "rectified_flow" else "epsilon"
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
    prediction_type = args.prediction_type or default
    policies = {
        name: build_policy(c, schedule, prediction_type, data_spectrum=_unit_variance)
        for name, c in configs.items()
    }
    return schedule, policies


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
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set needs a YAML value, got {setting!r}: {error}") from error
    # YAML reads 1e-3 as a string.
    with contextlib.suppress(ValueError):
        value = float(value) if isinstance(value, str) else value
    return [policy] if dot else policies, key, value


def _follows_training(policy: TimestepPolicy) -> bool:
    return bool(policy.state_dict()["density"]) or isinstance(policy, LossNormalizedPolicy)


def _describe_one(schedule: NoiseSchedule, policy: TimestepPolicy) -> dict[str, Any]:
    importance = policy.density * policy.weight
    # If all weights are 0, no timestep has a share.
    importance = importance / importance.sum() if importance.sum() > 0 else importance

    def shares(first: int, end: int) -> dict[str, Any]:
        draws, counts = float(policy.density[first:end].sum()), float(importance[first:end].sum())
        return {"range": [first, end], "draws": draws, "importance": counts}

    return {
        "density": _numbers(policy.density),
        "weight": _numbers(policy.weight),
        "importance": _numbers(importance),
        "boundary_index": policy.boundary_index,
        "mean_weight": policy.mean_weight,
        "scope": policy.scope,
        "areas": {area: shares(first, end) for area, (first, end) in areas(schedule).items()},
    }


def _numbers(table: Tensor) -> list[float]:
    values: list[float] = table.tolist()
    assert all(math.isfinite(value) for value in values)
    return values


def _wrap(text: str) -> str:
    return textwrap.fill(text, width=100)


def _line_style(i: int) -> dict[str, Any]:
    """Makes overlapping lines visible: later ones are thinner and dashed."""
    dashes = (
        "-",
        (0, (6, 2)),
        (0, (2, 1.5)),
        (0, (8, 2, 2, 2)),
        (0, (1, 1)),
        (0, (12, 3)),
        (0, (4, 1, 1, 1)),
    )
    return {"linestyle": dashes[i % len(dashes)], "linewidth": max(1.4, 2.6 - 0.4 * i)}


def _dress(axis: Any, schedule: NoiseSchedule, label: str) -> None:
    for color, (first, end) in zip(AREA_COLORS, areas(schedule).values(), strict=True):
        axis.axvspan(first, end, color=color, linewidth=0, zorder=0)
    axis.set_ylabel(label, fontsize=11)
    high = axis.get_ylim()[1]
    axis.set_ylim(0, high)
    axis.grid(axis="y", color="#d0d0d0", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _name_areas(axis: Any, schedule: NoiseSchedule) -> None:
    T = schedule.num_timesteps
    for area, (first, end) in areas(schedule).items():
        if first == end:
            continue
        # A narrow area has no room for its name, so the name starts or ends at the area's edge.
        narrow = end - first < 0.12 * T
        place, align = ((first + end) / 2, "center") if not narrow else (end, "right" if end == T else "left")
        axis.text(
            place, 1.01, area, transform=axis.get_xaxis_transform(), ha=align, va="bottom", color="#444444"
        )


if __name__ == "__main__":
    sys.exit(main())
