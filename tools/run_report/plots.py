"""Draws line charts and heat maps as inline SVG in the colours of the page's theme.

Colours are CSS classes of page.css: c0, c1, ... for lines, a0 to a2 for areas.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from run_report.page import data_uri

WIDTH, HEIGHT = 560, 290
LEFT, RIGHT, TOP, BOTTOM = 66, 22, 22, 44
# More points than a chart has pixels. Tables with the usual T = 1000 are drawn unchanged.
MAX_POINTS = 1000
NUM_COLUMNS = 160
# Five colours of viridis, whose lightness rises evenly. Source: van der Walt and Smith 2015, CC0.
COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))

Point = tuple[float, float | None]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Line:
    """Points with rising x. A y that is None or not finite is a gap.

    `band` has a lower and an upper y for each point; the area between them is shaded.
    """

    label: str
    points: Sequence[Point]
    band: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True)
class Span:
    """A shaded range of the x-axis, with its name above."""

    label: str
    start: float
    end: float


@dataclass(frozen=True)
class _Axis:
    """Maps values in [low, high], high > low, to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(v) if self.is_log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """About six round numbers inside the range."""
        powers = _log_ticks(self.low, self.high) if self.is_log else []
        if len(powers) > 1:
            return powers
        raw = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(raw))
        step = unit * next(factor for factor in (1, 2, 5, 10) if factor * unit >= raw)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step * (1 + 1e-9)) + 1)]


def line_chart(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    is_log: bool = False,
    spans: Sequence[Span] = (),
    x_range: tuple[float, float] | None = None,
) -> str:
    """A line chart as SVG; '' if no line has a point to show.

    Args:
        lines: the lines, in order of their colours.
        x_label, y_label: labels of the axes.
        is_log: use a logarithmic y-axis if each value of the lines is positive. A linear axis includes 0.
        spans: shaded ranges behind the lines.
        x_range: range of the x-axis; None uses that of the points.
    """
    # A loss may be negative: log-likelihoods are, and contrastive and alignment losses.
    is_log = is_log and all(y is None or not -math.inf < y <= 0 for line in lines for _, y in line.points)
    shown = [_thinned(_with_gaps(line, is_log=is_log)) for line in lines]
    values = [y for line in shown for _, y in line.points if y is not None]
    values += [y for line in shown for pair in line.band if pair is not None for y in pair]
    if not values:
        return ""
    places = [x for line in shown for x, _ in line.points]
    x = _Axis(*_widened(*(x_range or (min(places), max(places)))), LEFT, WIDTH - RIGHT)
    low, high = min(values), max(values)
    if not is_log:
        low, high = min(0.0, low * 1.05), max(0.0, high * 1.05)
    y = _Axis(*_widened(low, high, is_log=is_log), HEIGHT - BOTTOM, TOP, is_log)
    parts = [_span(span, x, number) for number, span in enumerate(spans)]
    parts += [_frame(x, y, x_label, y_label)]
    parts += [_band(line, x, y, number) for number, line in enumerate(shown)]
    parts += [_drawn(line, x, y, number) for number, line in enumerate(shown)]
    return _svg(parts, f"{y_label} against {x_label}: {', '.join(line.label for line in lines)}")


def heat_map(
    steps: Sequence[float],
    columns: Sequence[Sequence[float | None]],
    *,
    y_range: tuple[float, float],
    x_label: str,
    y_label: str,
    value_label: str,
) -> str:
    """A heat map as SVG; '' if there is no value. Its colours are logarithmic without a negative value.

    Zeros are left empty among logarithmic colours, which have none for them.

    Args:
        steps: x of each column, rising; a column extends from the previous step to its own.
        columns: values per step, lowest row first, all of one length; None is left empty.
        y_range: range of the y-axis.
        x_label, y_label, value_label: labels of the axes and of the values.
    """
    table = _by_step(steps, columns)  # (rows, columns)
    known = table[np.isfinite(table)]
    if not len(known):
        return ""
    is_log = bool(known.min() > 0)
    low, high = _widened(float(known.min()), float(known.max()), is_log=is_log)
    bar = 14
    x = _Axis(0, float(steps[-1]), LEFT, WIDTH - RIGHT - bar - 58)
    y = _Axis(*y_range, HEIGHT - BOTTOM, TOP)
    scale = _Axis(low, high, HEIGHT - BOTTOM, TOP, is_log=is_log)
    place = x.end + 12
    ends = (math.log(low), math.log(high)) if is_log else (low, high)
    cells = _image(_colored(np.log(table) if is_log else table, *ends)[::-1])
    ramp = _image(_colored(np.linspace(0, 1, 64)[:, None], 0, 1)[::-1])
    parts = [
        _placed(cells, x.start, TOP, x.end - x.start, y.start - TOP),
        _frame(x, y, x_label, y_label, has_grid=False),
        _placed(ramp, place, TOP, bar, y.start - TOP),
    ]
    parts += [
        f'<text x="{place + bar + 5:.0f}" y="{scale(tick) + 4:.1f}">{tick:.4g}</text>'
        for tick in scale.ticks()
    ]
    return _svg(parts, f"{value_label} by {x_label} and {y_label}")


def staircase(ranges: Sequence[tuple[int, int]], values: Sequence[float | None]) -> list[Point]:
    """Points of a line that is constant on each range [first, end); empty ranges are skipped."""
    spans = zip(ranges, values, strict=True)
    return [(x, value) for (first, end), value in spans if first < end for x in (first, end)]


def _svg(parts: Sequence[str], label: str) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{body}</svg>'


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str, *, has_grid: bool = True) -> str:
    bottom, right = y.start, x.end
    parts = []
    for tick in y.ticks():
        height = y(tick)
        if has_grid:
            parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{right:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 7}" y="{height + 4:.1f}">{_number(tick)}</text>')
    for tick in x.ticks():
        place = x(tick)
        parts.append(f'<path class="axis" d="M{place:.1f} {bottom}v4"/>')
        parts.append(f'<text class="mid" x="{place:.1f}" y="{bottom + 18}">{_number(tick)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right:.1f}"/>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="mid" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 8}">{escape(x_label)}</text>'
        f'<text class="mid" transform="translate(13 {middle:.0f}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _span(span: Span, x: _Axis, number: int) -> str:
    start, width = x(span.start), x(span.end) - x(span.start)
    height, middle = HEIGHT - BOTTOM - TOP, start + width / 2
    drawn = f'<rect class="a{number}" x="{start:.1f}" y="{TOP}" width="{width:.1f}" height="{height}"/>'
    # A letter takes about six pixels; a narrow area has no room for its name.
    if width > 6 * len(span.label):
        drawn += f'<text class="mid area" x="{middle:.1f}" y="{TOP - 6}">{escape(span.label)}</text>'
    return drawn


def _drawn(line: Line, x: _Axis, y: _Axis, number: int) -> str:
    """Draws a line in pieces between gaps; a single point is a dot."""
    parts = []
    for piece in _pieces(line.points):
        if len(piece) == 1:
            ((place, value),) = piece
            parts.append(f'<circle class="dot c{number}" cx="{x(place):.1f}" cy="{y(value):.1f}" r="3"/>')
        else:
            path = "L".join(f"{x(place):.1f} {y(value):.1f}" for place, value in piece)
            parts.append(f'<path class="line c{number}" d="M{path}"/>')
    return "".join(parts)


def _band(line: Line, x: _Axis, y: _Axis, number: int) -> str:
    if not line.band:
        return ""
    places = [place for place, _ in line.points]
    parts = []
    for piece in _pieces(list(zip(places, line.band, strict=True))):
        upper = [f"{x(place):.1f} {y(high):.1f}" for place, (_, high) in piece]
        lower = [f"{x(place):.1f} {y(low):.1f}" for place, (low, _) in reversed(piece)]
        parts.append(f'<path class="band c{number}" d="M{"L".join([*upper, *lower])}Z"/>')
    return "".join(parts)


def _pieces(points: Sequence[tuple[float, Value | None]]) -> list[list[tuple[float, Value]]]:
    """Splits points at gaps."""
    pieces: list[list[tuple[float, Value]]] = [[]]
    for place, value in points:
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append((place, value))
    return [piece for piece in pieces if piece]


def _thinned(line: Line) -> Line:
    """Reduces a line to at most `MAX_POINTS` points: means of groups of neighbours, at the group's last x."""
    size = -(-len(line.points) // MAX_POINTS)
    if size <= 1:
        return line
    points: list[Point] = []
    for first in range(0, len(line.points), size):
        group = line.points[first : first + size]
        known = [value for _, value in group if value is not None]
        points.append((group[-1][0], sum(known) / len(known) if known else None))
    return Line(line.label, points)


def _with_gaps(line: Line, *, is_log: bool) -> Line:
    """Replaces every y that cannot be shown on the axis by None."""
    least = 0.0 if is_log else -math.inf
    points = [(x, y if y is not None and least < y < math.inf else None) for x, y in line.points]
    band = [
        pair if pair is not None and all(least < y < math.inf for y in pair) else None for pair in line.band
    ]
    return Line(line.label, points, band)


def _widened(low: float, high: float, *, is_log: bool = False) -> tuple[float, float]:
    """The range [low, high]; if it is a single value, a wider range around it."""
    if high > low:
        return low, high
    if is_log:
        return low / 2, low * 2
    margin = abs(low) / 2 or 0.5
    return low - margin, low + margin


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in the range; if few, also 2 and 5 times these; if many, only every n-th one."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6)
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    found = [f * 10.0**power for power in range(first, last + 1, every) for f in factors]
    return [tick for tick in found if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]


def _number(value: float) -> str:
    """A short form of a number: 0, 0.05, 2e-05, 1200, 400k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


def _by_step(steps: Sequence[float], columns: Sequence[Sequence[float | None]]) -> npt.NDArray[np.float64]:
    """Means over NUM_COLUMNS equal intervals from 0 to the last step, (rows, NUM_COLUMNS); NaN if unknown.

    Zeros count as unknown unless there are negative values too.
    """
    values = np.array(
        [[math.nan if v is None else v for v in column] for column in columns], dtype=np.float64
    )
    if not (values < 0).any():
        values[values == 0] = math.nan
    ends = np.arange(NUM_COLUMNS + 1) * steps[-1] / NUM_COLUMNS
    table = np.full((values.shape[1], NUM_COLUMNS), math.nan)
    # A column of values extends from the previous step to its own. These are the columns that overlap each
    # interval: the first one ends after the interval's start, the last one ends at or after its end.
    firsts = np.searchsorted(steps, ends[:-1], side="right")
    lasts = np.searchsorted(steps, ends[1:], side="left")
    for number, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        group = values[first : last + 1]
        known = np.isfinite(group)
        sums = np.where(known, group, 0).sum(0)
        table[:, number] = np.divide(sums, known.sum(0), out=table[:, number], where=known.any(0))
    return table


def _colored(values: npt.NDArray[np.float64], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Colours of values between low and high, RGBA (rows, columns, 4); NaN is transparent."""
    share = np.nan_to_num((values - low) / (high - low)).clip(0, 1)
    anchors = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(share, anchors, [color[i] for color in COLORS]) for i in range(3)]
    channels.append(np.where(np.isfinite(values), 255, 0))
    return np.stack(channels, axis=-1).astype(np.uint8)


def _image(pixels: npt.NDArray[np.uint8]) -> str:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
    return data_uri("image/png", content.getvalue())


def _placed(uri: str, left: float, top: float, width: float, height: float) -> str:
    place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<image class="cells" {place} preserveAspectRatio="none" href="{uri}"/>'
