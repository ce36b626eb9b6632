"""Where the best logit-normal law is, beside where the data's spectrum puts it.

python -m benchmarks.flow.plots outputs/flow/results.jsonl --out DIR

Writes flow-laws.png, the distance over the mean of the law on each data set, and flow-centres.png, the best
mean over the spectrum's.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flow.laws import MEANS, WIDTHS, logit_normal_name
from benchmarks.flow.report import Curves, curves_of, groups_of, mean_log_ratio
from benchmarks.flow.results import Result, read_results
from speedit_plugins.policies.recipes.spectral import spectral_flow


def main() -> None:
    """Writes both figures."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flow.plots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="a results file of benchmarks/flow")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("flow-laws", laws_figure(results)), ("flow-centres", centres_figure(results))):
        path = arguments.out / f"{name}.png"
        figure.savefig(path, dpi=120)
        print(path)


def laws_figure(results: Sequence[Result]) -> Any:
    """A matplotlib figure: ln of the distance over uniform's against the law's mean, per data set."""
    # Imported where it is used: matplotlib is an optional dependency.
    from matplotlib.figure import Figure

    groups = _of_flows(results)
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    found = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    all_axes = found.subplots(rows, columns, squeeze=False).flatten()
    for axes, group in zip(all_axes, groups, strict=False):
        _plot(axes, group)
    for axes in all_axes[len(groups) :]:
        axes.remove()
    all_axes[0].legend(fontsize="small")
    return found


def centres_figure(results: Sequence[Result]) -> Any:
    """A matplotlib figure: the mean of the best logit-normal law of width 1 over the spectrum's, per space.

    A space is left out if a law beside its best one was not trained, see `best_mean`.
    """
    from matplotlib.figure import Figure

    found = Figure(figsize=(6, 5), layout="constrained")
    axes = found.subplots()
    for group in _of_flows(results):
        centre = -group[0].facts["centre"] / 2
        sampler, spaces = next(iter(group[0].distances.items()))
        best = {space: best_mean(curves_of(group, sampler, space, chooses=True)) for space in spaces}
        shown = {space: mean for space, mean in best.items() if mean is not None}
        if shown:
            means = list(shown.values())
            axes.plot([centre] * len(means), means, marker="o", label=f"{group[0].data}: {', '.join(shown)}")
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color="k", linestyle="--", label="the spectrum's centre")
    axes.plot([low, high], [_law_mean(low), _law_mean(high)], color="k", linestyle=":", label="spectral_flow")
    axes.set_xlabel("the spectrum's centre, as a mean of logit(u)")
    axes.set_ylabel("best mean of logit(u)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    return found


def _law_mean(centre: float) -> float:
    """Mean of logit(u) of `spectral_flow`, for a spectrum's centre as a mean of logit(u)."""
    law = spectral_flow(mean=-2 * centre)["density"]
    return float(-(law["slope"] * law["mean"] + law["offset"]) / 2)


def best_mean(curves: Curves) -> float | None:
    """The mean of least distance, of a parabola through the best of `MEANS` and its two neighbours.

    None if one of the three was not trained, as at either end, or if they have no minimum.
    """
    values = {
        mean: mean_log_ratio(curves, logit_normal_name(mean, 1.0))
        for mean in MEANS
        if logit_normal_name(mean, 1.0) in curves
    }
    if not values:
        return None
    place = MEANS.index(min(values, key=lambda mean: values[mean]))
    around = MEANS[max(0, place - 1) : place + 2]
    if len(around) < 3 or not values.keys() >= set(around):
        return None
    left, middle, right = (values[mean] for mean in around)
    step = around[1] - around[0]
    bend = left - 2 * middle + right
    return around[1] + step / 2 * (left - right) / bend if 0 < bend < math.inf else None


def _of_flows(results: Sequence[Result]) -> list[list[Result]]:
    """The groups that trained a flow with a law of the grid, each data set once."""
    wanted = [
        group
        for group in groups_of(results)
        if group[0].options["prediction"] == "flow"
        and any(r.law == logit_normal_name(0.0, 1.0) for r in group)
    ]
    first: dict[str, list[Result]] = {}
    for group in wanted:
        first.setdefault(group[0].data, group)
    return list(first.values())


def _plot(axes: Any, group: Sequence[Result]) -> None:
    first = group[0]
    sampler = next(iter(first.distances))
    curves = curves_of(group, sampler, next(iter(first.distances[sampler])), chooses=True)
    for width in WIDTHS:
        means = [mean for mean in MEANS if logit_normal_name(mean, width) in curves]
        values = [mean_log_ratio(curves, logit_normal_name(mean, width)) for mean in means]
        axes.plot(means, values, marker="o", markersize=4, label=f"logit-normal, width {width:g}")
    if "spectral_flow" in curves:
        axes.axhline(mean_log_ratio(curves, "spectral_flow"), color="k", linestyle=":", label="spectral_flow")
    axes.axvline(-first.facts["centre"] / 2, color="k", linestyle="--", label="the spectrum's centre")
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_title(first.data, fontsize="medium")
    axes.set_xlabel("mean of logit(u); u = 1 is noise")
    axes.set_ylabel("ln distance over uniform's")
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
