"""The plots of a convergence run: distance over step, and speed-up over horizon.

python -m benchmarks.convergence.plots outputs/convergence/results.json
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.crossing import AT_LEAST, AT_MOST, EXACT, MIXED

# Colour and marker tell the lines of different policies apart.
_MARKERS = "osD^vP*Xp<>"


def main() -> None:
    """Draws the plots beside a results.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a results.json of benchmarks/convergence")
    path = parser.parse_args().results
    for written in draw(json.loads(path.read_text(encoding="utf-8")), path.parent):
        print(written)


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes distance.png and speed_up.png of the first sampler, and files named by sampler of the others."""
    written = []
    for number, sampler in enumerate(found["by_sampler"]):
        suffix = f"-{sampler}" if number else ""
        for stem, figure in figures(found, sampler).items():
            path = folder / f"{stem}{suffix}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def figures(found: dict[str, Any], sampler: str) -> dict[str, Any]:
    """The matplotlib figures "distance" and "speed_up" of a sampler, each with one pair of axes.

    With the baseline alone there is no figure "speed_up".
    """
    plots = {"distance": _distances}
    if len(found["by_sampler"][sampler]["speed_ups"]) > 1:
        plots["speed_up"] = _speed_ups
    return {stem: _figure(found, sampler, plot) for stem, plot in plots.items()}


def _figure(found: dict[str, Any], sampler: str, plot: Any) -> Any:
    # Imported where it is used: matplotlib is an optional dependency.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = list(found["by_sampler"][sampler]["speed_ups"])
    colours = colormaps["tab20" if len(names) > 10 else "tab10"].colors
    styles = {
        name: {"color": colours[i % len(colours)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4}
        for i, name in enumerate(names)
    }
    plot(axes, found, sampler, styles)
    axes.set_xscale("log")
    ticks = found["evaluations"]
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    # The legend is beside the axes, because on a small plot every corner has curves.
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _distances(axes: Any, found: dict[str, Any], sampler: str, styles: dict[str, Any]) -> None:
    steps = found["evaluations"]
    for name, style in styles.items():
        curves = [m["distances"][sampler] for m in found["members"] if m["name"] == name]
        columns = [[v for v in column if v is not None] for column in zip(*curves, strict=True)]
        means = [math.exp(sum(map(math.log, c)) / len(c)) if c else math.nan for c in columns]
        axes.plot(steps, means, label=name, **style)
        # Nobody can tell more shades than these apart.
        if name == found["baseline"] or len(styles) <= 4:
            low, high = ([end(c) if c else math.nan for c in columns] for end in (min, max))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.12, linewidth=0)
    _log_ticks(axes, [digit * 10**power for power in range(-2, 6) for digit in (1, 2, 5)])
    axes.set_xlabel("training step")
    axes.set_ylabel(f"Fréchet distance [{found['protocol']['features']}], {sampler}")
    shaded = "shaded" if len(styles) <= 4 else f"that of {found['baseline']} shaded"
    axes.set_title(f"{_setting(found)}\ngeometric mean of the seeds, {shaded} from the least to the greatest")


def _speed_ups(axes: Any, found: dict[str, Any], sampler: str, styles: dict[str, Any]) -> None:
    compared = found["by_sampler"][sampler]
    horizons = found["evaluations"]
    bands = [compared["null_band"][str(s)] for s in horizons]
    # One seed has no band.
    if None not in bands:
        ends = ([end["value"] for end in side] for side in zip(*bands, strict=True))
        axes.fill_between(horizons, *ends, color="0.85", label="chance (5 to 95 %)")
        for s, band in zip(horizons, bands, strict=True):
            for end in band:
                _mark_bound(axes, s, end["value"], end["bound"], "0.4")
    axes.axhline(1, color="0.4", linewidth=1)
    for name, style in styles.items():
        if name == found["baseline"]:
            continue
        points = [compared["speed_ups"][name][str(s)] for s in horizons]
        means = [point["mean"] for point in points]
        axes.plot(horizons, means, label=name, **style)
        ends = [(p["mean"] - p["low"], p["high"] - p["mean"]) for p in points]
        axes.errorbar(
            horizons,
            means,
            yerr=list(zip(*ends, strict=True)),
            fmt="none",
            ecolor=style["color"],
            alpha=0.5,
            capsize=2,
        )
        for s, point in zip(horizons, points, strict=True):
            _mark_bound(axes, s, point["mean"], point["bound"], style["color"])
    _log_ticks(axes, (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 8, 10, 14, 20))
    axes.set_xlabel(f"horizon: step of {found['baseline']} whose distance is to be reached")
    axes.set_ylabel(f"speed-up, {sampler}")
    axes.set_title(
        f"{_setting(found)}\nmean over seeds with its 95 % interval; ↑ at least, ↓ at most, ↕ either"
    )


def _mark_bound(axes: Any, step: int, value: float, bound: str, colour: Any) -> None:
    """An arrow that points to where the true value lies."""
    if bound != EXACT:
        arrow = {AT_LEAST: "↑", AT_MOST: "↓", MIXED: "↕"}[bound]
        axes.annotate(arrow, (step, value), xytext=(4, -4), textcoords="offset points", color=colour)


def _log_ticks(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])


def _setting(found: dict[str, Any]) -> str:
    protocol = found["protocol"]
    seeds = len({member["seed"] for member in found["members"]})
    name = Path(protocol["data"]).name.split(".")[0]
    seeds_of = f"{seeds} seed{'s' if seeds > 1 else ''}"
    return f"{name} {protocol['image_size']}x{protocol['image_size']}, {protocol['schedule']}, {seeds_of}"


if __name__ == "__main__":
    main()
