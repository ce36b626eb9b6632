"""A density or a weight from numbers of the user's own: `table`.

The numbers are a list in the config, or in a file: JSON, or text with one number or one point a line. Plain
numbers are values over equal parts of u = (index + 1/2) / T. Points (u, value) are joined by a smooth
curve that has no maximum or minimum of its own between them.

Dims: T timesteps, N numbers.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.densities.density import Density
from speedit_plugins.policies.schedule import NoiseSchedule
from speedit_plugins.registry import DENSITIES, WEIGHTINGS

# What a line of a text file has, by how many numbers.
_KINDS = ("one number", "a point (u, value)")


def table_density(
    schedule: NoiseSchedule, *, values: Any = None, points: Any = None, path: str | None = None
) -> Density:
    """Density in proportion to a curve of the user's own; see `curve`.

    Example:
        >>> table_density(NoiseSchedule.rectified_flow(4), values=[0, 1, 2, 1]).table.tolist()
        [0.0, 0.25, 0.5, 0.25]
    """
    return Density(curve(schedule, values, points, path))


def table_weight(
    schedule: NoiseSchedule, *, values: Any = None, points: Any = None, path: str | None = None
) -> Tensor:
    """Weights (T,) along a curve of the user's own; see `curve`.

    Example:
        >>> table_weight(NoiseSchedule.rectified_flow(4), points=[[0, 1], [1, 2]]).tolist()
        [1.125, 1.375, 1.625, 1.875]
    """
    return curve(schedule, values, points, path)


def curve(schedule: NoiseSchedule, values: Any, points: Any, path: str | None) -> Tensor:
    """The value at each timestep, shape (T,) float64.

    Args:
        values: N numbers >= 0; the first belongs to the cleanest part of the timesteps. If N is not T, a
            timestep between two parts gets a value between theirs.
        points: (u, value) with rising u in [0, 1], N >= 2. Outside of them the curve is flat. Between them it
            is a monotone cubic spline. Source: Fritsch & Butland 1984, SIAM J. Sci. Stat. Comput. 5.
        path: of a file that has either, in place of it.

    Raises:
        ValueError: not exactly one of the three, a file that cannot be read, or values of the wrong kind.
    """
    sources = {"values": values, "points": points, "path": path}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"table needs one of values, points and path, got {' and '.join(given) or 'none'}")
    numbers = _read(path) if path is not None else values if values is not None else points
    found = _checked(numbers, path or given[0])
    if found.ndim == 1 and points is None:
        return _resampled(found, schedule.num_timesteps)
    if found.ndim == 2 and values is None:
        u = (torch.arange(schedule.num_timesteps, dtype=torch.float64) + 0.5) / schedule.num_timesteps
        return _spline(found[:, 0].contiguous(), found[:, 1], u)
    wanted = "numbers" if points is None else "points (u, value)"
    raise ValueError(f"table {given[0]} needs {wanted}, got {str(numbers)[:60]}")


def _read(path: str) -> Any:
    file = Path(path)
    try:
        # Spreadsheets may put a byte order mark before the first number.
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix == ".json":
            return json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"table {path}: cannot be read: {error}") from error
    rows: list[list[float]] = []
    for number, line in enumerate(text.splitlines(), start=1):
        row = _numbers(line)
        if row is None or len(row) > 2 or (row and rows and len(row) != len(rows[0])):
            wanted = _KINDS[len(rows[0]) - 1] if rows else f"{' or '.join(_KINDS)}, and no header"
            raise ValueError(f"table {path}, line {number}: wanted {wanted}, got {line.strip()[:60]!r}")
        rows += [row] if row else []
    return [row[0] for row in rows] if all(len(row) == 1 for row in rows) else rows


def _numbers(line: str) -> list[float] | None:
    """The numbers of a line of text, with commas or blanks between them. None if there is anything else."""
    try:
        return [float(part) for part in line.replace(",", " ").split()]
    except ValueError:
        return None


def _checked(numbers: Any, what: str) -> Tensor:
    try:
        found = torch.tensor(list(numbers), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"table {what} needs numbers, or points (u, value): {error}") from error
    is_points = found.ndim == 2 and found.shape[-1] == 2 and len(found) >= 2
    if not (found.ndim == 1 and len(found) or is_points):
        raise ValueError(
            f"table {what} needs numbers, or two points (u, value) or more, got shape {tuple(found.shape)}"
        )
    heights = found[:, 1] if is_points else found
    if not (found.isfinite().all() and (heights >= 0).all()):
        raise ValueError(f"table {what} needs finite values >= 0, got {heights.min():g} to {heights.max():g}")
    if is_points and not (found[0, 0] >= 0 and found[-1, 0] <= 1 and (found[:, 0].diff() > 0).all()):
        raise ValueError(f"table {what} needs points with rising u in [0, 1], got {found[:, 0].tolist()[:8]}")
    return found


def _resampled(values: Tensor, num_timesteps: int) -> Tensor:
    if len(values) == num_timesteps:
        return values
    if len(values) == 1:
        return values.expand(num_timesteps).clone()
    resized = torch.nn.functional.interpolate(values[None, None], size=num_timesteps, mode="linear")
    return resized[0, 0]


def _spline(xs: Tensor, ys: Tensor, x: Tensor) -> Tensor:
    """The monotone cubic through (xs, ys), at x; flat outside. Its slope at the first and last point is 0."""
    width = xs.diff()
    slope = ys.diff() / width
    tangent = torch.zeros_like(ys)
    before, after = slope[:-1], slope[1:]
    w1, w2 = 2 * width[1:] + width[:-1], width[1:] + 2 * width[:-1]
    # The harmonic mean of the slopes on both sides; 0 where they have different signs.
    mean = (w1 + w2) / (w1 / before + w2 / after)
    tangent[1:-1] = torch.where(before * after > 0, mean, torch.zeros_like(mean))
    if len(xs) == 2:
        tangent[:] = slope
    x = x.clamp(xs[0], xs[-1])
    right = torch.searchsorted(xs, x).clamp(1, len(xs) - 1)
    left = right - 1
    h = width[left]
    s = (x - xs[left]) / h
    return (
        (1 + 2 * s) * (1 - s) ** 2 * ys[left]
        + s * (1 - s) ** 2 * h * tangent[left]
        + s**2 * (3 - 2 * s) * ys[right]
        + s**2 * (s - 1) * h * tangent[right]
    )


DENSITIES.register_module(name="table", module=table_density)
WEIGHTINGS.register_module(name="table", module=table_weight)
