"""Figures of timestep policies: panels against the timestep, and against log-SNR beside them.

Dims: T timesteps.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from policy_pictures.tables import AREAS, areas
from speedit_plugins import NoiseSchedule

# Label of the y-axis -> name of a line -> the line's value at each timestep, None for a gap.
Panels = Mapping[str, Mapping[str, Sequence[float | None]]]

AREA_COLORS = ("#e8eef7", "#f7f7f7", "#fbeee3")
# Okabe and Ito's palette, distinguishable with any kind of colour vision.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# A panel has a logarithmic axis if its largest value is this many times the middle one.
_LOG_RATIO = 50


def save_figure(
    path: Path,
    title: str,
    schedule: NoiseSchedule,
    panels: Panels,
    beside: Panels | None = None,
    log_snr_range: tuple[float, float] | None = None,
) -> None:
    """Writes a figure with one panel above the other, against the timestep, with shaded schedule areas.

    Args:
        path: the file; its suffix decides the format.
        title: title of the figure.
        schedule: decides the shaded areas.
        panels: lines by name for each y-axis label; a line has one value per timestep, None for a gap.
        beside: as many panels again, drawn against log-SNR in a second column.
        log_snr_range: the lowest and the highest log-SNR of the second column; None is all of them.

    Raises:
        ValueError: the file cannot be written, or matplotlib does not support its format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = [(over_time(schedule), panels)]
    if beside is not None:
        columns.append((over_log_snr_axis(schedule, log_snr_range), beside))
    width, height = 9 if beside is None else 13, 1 + 2.5 * len(panels)
    figure, grid = plt.subplots(
        len(panels),
        len(columns),
        figsize=(width, height),
        sharex="col",
        squeeze=False,
        layout="constrained",
    )
    for place, (ruler, column) in enumerate(columns):
        for axis, (label, lines) in zip(grid[:, place], column.items(), strict=True):
            _draw(axis, ruler, lines)
            _dress(axis, ruler, label, lines)
        _name_areas(grid[0, place], ruler)
        grid[-1, place].set_xlabel(ruler.label)
        grid[-1, place].set_xlim(ruler.first, ruler.last)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    _legend(figure, grid[0, 0], letters=100 if beside is None else 145)
    try:
        # Without its date, an SVG of the same figure is the same file.
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from error
    finally:
        plt.close(figure)


@dataclass(frozen=True)
class Ruler:
    """A horizontal axis: clean on the left, noise on the right."""

    label: str
    places: Sequence[float]  # of each timestep
    first: float
    last: float
    areas: Mapping[str, tuple[float, float]]


def over_time(schedule: NoiseSchedule) -> Ruler:
    """The timesteps from 0, clean, to T."""
    T = schedule.num_timesteps
    return Ruler("timestep index t  (0 is clean, T is noise)", range(T), 0, T, areas(schedule))


def over_log_snr_axis(schedule: NoiseSchedule, log_snr_range: tuple[float, float] | None = None) -> Ruler:
    """Log-SNR, falling from left to right, so that noise is on the right here too.

    Args:
        schedule: the noise schedule.
        log_snr_range: the lowest and the highest that are shown; None is all that are finite.
    """
    places = schedule.log_snr.tolist()
    seen = [place for place in places if math.isfinite(place)]
    last, first = log_snr_range or (min(seen), max(seen))
    spans = {}
    for name, (begin, end) in areas(schedule).items():
        inner = seen[begin:end]
        if inner:
            # An area ends where the next one begins.
            low = seen[end] if end < len(seen) else last
            span = (first if begin == 0 else inner[0], low)
            clipped = [min(max(place, last), first) for place in span]
            spans[name] = (clipped[0], clipped[1])
    return Ruler("log-SNR  (noise is on the right)", places, first, last, spans)


def shade_areas(axis: Any, ruler: Ruler) -> None:
    """Fills the background of each of the schedule's areas with its color."""
    for color, name in zip(AREA_COLORS, AREAS, strict=True):
        if name in ruler.areas:
            axis.axvspan(*ruler.areas[name], color=color, linewidth=0, zorder=0)


def _draw(axis: Any, ruler: Ruler, lines: Mapping[str, Sequence[float | None]]) -> None:
    for i, (line, values) in enumerate(lines.items()):
        drawn = [math.nan if value is None else value for value in values]
        color = LINE_COLORS[i % len(LINE_COLORS)]
        axis.plot(ruler.places, drawn, color=color, **_line_style(i), label=line)


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


def _dress(axis: Any, ruler: Ruler, label: str, lines: Mapping[str, Sequence[float | None]]) -> None:
    shade_areas(axis, ruler)
    axis.set_ylabel(label, fontsize=11)
    low, high = sorted((ruler.first, ruler.last))
    seen = sorted(
        value
        for values in lines.values()
        for place, value in zip(ruler.places, values, strict=True)
        if value is not None and low <= place <= high
    )
    top = seen[-1] if seen and seen[-1] > 0 else 1.0
    if seen and top > _LOG_RATIO * max(seen[len(seen) // 2], 1e-12) > 0 and label.startswith("weight"):
        axis.set_yscale("log")
        axis.set_ylim(max(seen[0], top * 1e-6), 1.5 * top)
    else:
        axis.set_ylim(0, 1.06 * top)
    axis.grid(axis="y", color="#d0d0d0", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _name_areas(axis: Any, ruler: Ruler) -> None:
    for area, (first, end) in ruler.areas.items():
        if first == end:
            continue
        # A narrow area has no room for its name, so the name starts or ends at the area's edge.
        narrow = abs(end - first) < 0.12 * abs(ruler.last - ruler.first)
        at_end = (end, "right" if end == ruler.last else "left")
        place, align = at_end if narrow else ((first + end) / 2, "center")
        axis.text(
            place, 1.01, area, transform=axis.get_xaxis_transform(), ha=align, va="bottom", color="#444444"
        )


def _legend(figure: Any, axis: Any, letters: int) -> None:
    """One legend below all panels. About `letters` letters fit beside each other, with the legend's keys."""
    handles, labels = axis.get_legend_handles_labels()
    labels = [textwrap.fill(label, letters - 12) for label in labels]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = len(labels) if len(labels) <= 4 else min(4, math.ceil(len(labels) / 2))
    columns = max(1, min(columns, letters // (longest + 6)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=11)
