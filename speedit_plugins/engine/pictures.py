"""Pictures of a run: sample grids and the loss curve.

Dims: B images, C channels, H x W pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

# Cells smaller than this are enlarged by a whole factor, smoothly: blocks hide an 8 x 8 digit from the eye.
_MIN_CELL = 64


def to_uint8(images: Tensor) -> npt.NDArray[np.uint8]:
    """Images (B, C, H, W) in [-1, 1], clamped, as uint8 (B, H, W, C)."""
    scaled = ((images.float() + 1) * 127.5).round().clamp(0, 255)
    return np.asarray(scaled.to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy())


def save_png(image: npt.NDArray[np.uint8], path: Path) -> None:
    """One uint8 image (H, W, C), C 1 or 3, as PNG."""
    _pillow(image).save(path)


def save_grid(images: Tensor, path: Path, *, columns: int) -> None:
    """Images (B, C, H, W) in [-1, 1] as one PNG, row by row, a line between cells, small ones enlarged."""
    cells = to_uint8(images)
    scale = max(1, _MIN_CELL // cells.shape[1])
    height, width, channels = scale * cells.shape[1], scale * cells.shape[2], cells.shape[3]
    rows = -(-len(cells) // columns)
    gap = 2
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 96, dtype=np.uint8)
    for i, cell in enumerate(cells):
        top, left = (gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap))
        enlarged = _pillow(cell).resize((width, height), Image.Resampling.BICUBIC)
        grid[top : top + height, left : left + width] = np.asarray(enlarged).reshape(height, width, channels)
    save_png(grid, path)


def _pillow(image: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_loss_curve(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """The logged losses against the step as PNG: weighted loss, raw mse, and mse under uniform timesteps.

    Args:
        rows: lines of metrics.jsonl, each with `step` and the losses.
        path: the PNG file.
        title: above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = {
        "uniform_mse": "mse, corrected to uniform timesteps (compares policies)",
        "mse": "mse at the drawn timesteps",
        "loss": "training loss (weight * mse + vb)",
    }
    for key, label in curves.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    axes.set(xlabel="training step", ylabel="loss", title=title, yscale="log")
    for axis_part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_part("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
