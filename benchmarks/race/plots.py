"""The figure of a race: distance over seconds of training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.race.laps import Lap
from benchmarks.race.report import Field

_MARKERS = "osD^vP*X<>hdp"


def save_figure(laps: Sequence[Lap], path: Path) -> str:
    """Writes the figure. Gives a line that says where it is, or why there is none."""
    if not Field.of(laps).peers and not Field.of(laps).ours:
        return "no figure: no training has ended"
    try:
        figure = draw(laps)
    except ImportError as error:
        return f"no figure: {error}"
    figure.savefig(path, dpi=120)
    return f"figure: {path}"


def draw(laps: Sequence[Lap]) -> Any:
    """A matplotlib figure with a pair of axes a space: peers are dashed, ours solid, one line a seed."""
    # Imported where it is used: matplotlib is an optional dependency.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    field, spaces = Field.of(laps), list(laps[0].distances)
    figure = Figure(figsize=(7 * len(spaces), 5), layout="constrained")
    # The strong colours first, then the light ones.
    colours = [*colormaps["tab20"].colors[::2], *colormaps["tab20"].colors[1::2]]
    for axes, space in zip(figure.subplots(1, len(spaces), squeeze=False)[0], spaces, strict=True):
        for number, (name, runs) in enumerate([*field.ours.items(), *field.peers.items()]):
            for place, run in enumerate(runs.values()):
                axes.plot(
                    [lap.seconds for lap in run.laps],
                    [lap.in_space(space) for lap in run.laps],
                    color=colours[number % len(colours)],
                    marker=_MARKERS[number % len(_MARKERS)],
                    linestyle="-" if name in field.ours else "--",
                    linewidth=2 if name in field.ours else 1,
                    label=name if place == 0 else None,
                )
        axes.set(xscale="log", yscale="log", xlabel="seconds of training", title=space)
        axes.set_ylabel("squared Fréchet distance")
        axes.grid(visible=True, which="both", alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure
