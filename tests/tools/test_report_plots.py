"""Line charts and heat maps of the report: where a value is drawn, and what is left out."""

import base64
import importlib
import io
import math
import re
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

page: ModuleType = importlib.import_module("run_report.page")
plots: ModuleType = importlib.import_module("run_report.plots")


def test_points_lie_where_the_axes_say() -> None:
    line = plots.Line("line", [(0.0, 1.0), (5.0, None), (10.0, 100.0)])
    svg = plots.line_chart([line], x_label="x", y_label="y", is_log=True)
    # A point with gaps on both sides becomes a dot. Here they are in the lower left and upper right corners.
    dots = re.findall(r'<circle class="dot c0" cx="([\d.]+)" cy="([\d.]+)"', svg)
    corners = [
        (plots.LEFT, plots.HEIGHT - plots.BOTTOM),
        (plots.WIDTH - plots.RIGHT, plots.TOP),
    ]
    assert [(float(x), float(y)) for x, y in dots] == corners
    # On a logarithmic axis 10 is half way between 1 and 100.
    middle = (plots.TOP + plots.HEIGHT - plots.BOTTOM) / 2
    assert f'y="{middle + 4:.1f}">10</text>' in svg


def test_what_is_not_finite_is_a_gap() -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, -math.inf, 4.0, 5.0]
    given = plots.Line("line", list(enumerate(values)))
    wanted = plots.Line("line", [(x, y if math.isfinite(y) else None) for x, y in enumerate(values)])
    for is_log in (False, True):
        drawn = [
            plots.line_chart([line], x_label="x", y_label="y", is_log=is_log) for line in (given, wanted)
        ]
        assert drawn[0] == drawn[1]
        assert (drawn[0].count('class="line c0"'), drawn[0].count('class="dot c0"')) == (2, 1)
    points, band = [(0, 1.0), (1, 2.0), (2, 3.0)], [(0.5, 1.5), (0.0, math.nan), (2.0, 4.0)]
    svg = plots.line_chart([plots.Line("line", points, band)], x_label="x", y_label="y", is_log=True)
    assert "nan" not in svg
    assert svg.count('class="band c0"') == 2


def test_a_chart_without_a_value_to_show_is_empty() -> None:
    empty = plots.Line("line", [(0.0, None), (1.0, None)])
    assert plots.line_chart([empty], x_label="x", y_label="y") == ""
    labels = {"y_range": (0, 10), "x_label": "x", "y_label": "y", "value_label": "v"}
    assert plots.heat_map([1.0], [[None, None]], **labels) == ""
    assert page.chart("title", "") == ""


def test_negative_values_have_linear_axes_and_colours() -> None:
    line = plots.Line("loss", [(0.0, 2.0), (1.0, 0.0), (2.0, -2.0)])
    charts = [plots.line_chart([line], x_label="x", y_label="y", is_log=log) for log in (True, False)]
    assert charts[0] == charts[1]
    # Two, none and minus two lie at equal distances, and inside the frame.
    (path,) = re.findall(r'class="line c0" d="M([^"]+)"', charts[0])
    heights = [float(point.split()[1]) for point in path.split("L")]
    assert heights[2] - heights[1] == pytest.approx(heights[1] - heights[0], abs=0.11)
    assert all(plots.TOP < height < plots.HEIGHT - plots.BOTTOM for height in heights)
    below = plots.Line("loss", [(0.0, -1.0), (1.0, -2.0)])
    assert 'class="line c0"' in plots.line_chart([below], x_label="x", y_label="y", is_log=True)
    labels = {"y_range": (0, 3), "x_label": "x", "y_label": "y", "value_label": "v"}
    svg = plots.heat_map([1.0], [[-1.0, 0.0, 1.0]], **labels)
    first = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert [tuple(row[0, :3]) for row in pixels[::-1, None, 0]] == [plots.COLORS[i] for i in (0, 2, 4)]
    # Without a negative value a zero is left empty, as before.
    svg = plots.heat_map([1.0], [[0.0, 1.0, 10.0]], **labels)
    first = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)[0]
    assert np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))[::-1, 0, 3].tolist() == [0, 255, 255]


def test_long_lines_are_thinned_to_means() -> None:
    points = [(float(step), float(step % 2)) for step in range(4 * plots.MAX_POINTS)]
    svg = plots.line_chart([plots.Line("line", points)], x_label="x", y_label="y")
    (path,) = re.findall(r'<path class="line c0" d="M([^"]+)"', svg)
    heights = {point.split()[1] for point in path.split("L")}
    assert path.count("L") + 1 == plots.MAX_POINTS
    # Zeros and ones alternate, so every mean of four is a half.
    assert len(heights) == 1


def test_a_staircase_is_level_on_each_range_and_skips_empty_ones() -> None:
    assert plots.staircase([(0, 1), (1, 1), (1, 3)], [2.0, None, 4.0]) == [
        (0, 2.0),
        (1, 2.0),
        (1, 4.0),
        (3, 4.0),
    ]


def test_a_band_ends_at_a_gap() -> None:
    points = [(0, 1.0), (1, 1.0), (1, None), (2, None), (2, 1.0), (3, 1.0)]
    around = (0.5, 1.5)
    line = plots.Line("line", points, [around, around, None, None, around, around])
    svg = plots.line_chart([line], x_label="x", y_label="y")
    assert svg.count('class="band c0"') == svg.count('class="line c0"') == 2


def test_columns_of_a_heat_map_reach_from_the_step_before_to_their_own() -> None:
    steps = [50.0, 100.0, 150.0, 160.0]
    (row,) = plots._by_step(steps, [[step] for step in steps])
    # Each stretch has one step, but the last column has ten.
    expected = [50.0] * 50 + [100.0] * 50 + [150.0] * 50 + [160.0] * 10
    assert row.tolist() == expected
    # A stretch with two steps shows their mean.
    (row,) = plots._by_step(range(1, 321), [[step] for step in range(1, 321)])
    assert row.tolist() == [2 * number + 1.5 for number in range(160)]


def test_a_heat_map_has_a_column_per_step_its_first_row_at_the_bottom() -> None:
    svg = plots.heat_map(
        [10.0, 20.0],
        [[1.0, 100.0], [None, 10.0]],
        y_range=(0, 2),
        x_label="step",
        y_label="timestep",
        value_label="loss",
    )
    first = re.findall(r'href="data:image/png;base64,([^"]+)"', svg)[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(first))))
    assert pixels.shape == (2, plots.NUM_COLUMNS, 4)
    middle = plots.NUM_COLUMNS // 2
    assert (pixels[:, :middle] == pixels[:, :1]).all()
    assert (pixels[:, middle:] == pixels[:, -1:]).all()
    pixels = pixels[:, [0, -1]]
    # The smallest value has the darkest colour, the largest the lightest. 10 has the middle one: on a
    # logarithmic scale it is half way between 1 and 100.
    assert tuple(pixels[1, 0, :3]) == plots.COLORS[0]
    assert tuple(pixels[0, 0, :3]) == plots.COLORS[-1]
    assert tuple(pixels[0, 1, :3]) == plots.COLORS[2]
    assert pixels[1, 1, 3] == 0


def test_ticks_are_round_and_inside_the_range() -> None:
    axis = plots._Axis(0.0, 1.05, 0, 1)
    assert axis.ticks() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert plots._Axis(1e-3, 10.0, 0, 1, is_log=True).ticks() == pytest.approx([1e-3, 1e-2, 0.1, 1, 10])
    # A narrow logarithmic range has fewer than two powers of ten, so it takes linear ticks.
    narrow = plots._Axis(0.61, 0.69, 0, 1, is_log=True).ticks()
    assert all(0.61 <= tick <= 0.69 for tick in narrow)
    assert len(narrow) >= 3
    assert math.isclose(narrow[1] - narrow[0], narrow[2] - narrow[1])
