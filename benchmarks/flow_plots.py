"""Where the best logit-normal law is, beside where the data's spectrum puts it.

python benchmarks/flow_plots.py outputs/flow/results.jsonl --out docs/images/flow-centre.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flow_laws import MEANS, WIDTHS, logit_normal_name
from flow_report import BASELINE, Curves, curves_of, groups_of, log_ratio, mean_of
from flow_results import Result, read_results


def main() -> None:
    """Writes the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="a results file of flow.py")
    parser.add_argument("--out", type=Path, required=True, help="the .png to write")
    arguments = parser.parse_args()
    figure(read_results(arguments.results)).savefig(arguments.out, dpi=120)
    print(arguments.out)


def figure(results: Sequence[Result]) -> Any:
    """A matplotlib figure: ln of the distance over uniform's against the law's mean, per data set."""
    # Imported where it is used: matplotlib is an optional dependency.
    from matplotlib.figure import Figure

    groups = groups_of(results)
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


def _plot(axes: Any, group: Sequence[Result]) -> None:
    first = group[0]
    sampler = next(iter(first.distances))
    curves = curves_of(group, sampler, next(iter(first.distances[sampler])))
    for width in WIDTHS:
        means = [mean for mean in MEANS if logit_normal_name(mean, width) in curves]
        values = [_at_horizon(curves, logit_normal_name(mean, width)) for mean in means]
        axes.plot(means, values, marker="o", markersize=4, label=f"logit-normal, width {width:g}")
    if "spectral_flow" in curves:
        axes.axhline(_at_horizon(curves, "spectral_flow"), color="k", linestyle=":", label="spectral_flow")
    axes.axvline(-first.facts["centre"] / 2, color="k", linestyle="--", label="the spectrum's centre")
    axes.axhline(0.0, color="grey", linewidth=0.8)
    axes.set_title(first.data, fontsize="medium")
    axes.set_xlabel("mean of logit(u); u = 1 is noise")
    axes.set_ylabel("ln distance over uniform's")
    axes.grid(alpha=0.3)


def _at_horizon(curves: Curves, law: str) -> float:
    return mean_of([log_ratio(curve, curves[BASELINE][seed], -1) for seed, curve in curves[law].items()])


if __name__ == "__main__":
    main()
