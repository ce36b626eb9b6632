"""Image files of a run: sample grids, videos, and the loss curve.

Dims: B samples, C channels, F frames, H x W pixels.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from speedit_plugins.files import write_whole

# Smaller cells are enlarged by a whole factor, smoothly: an 8 x 8 digit is hard to see in blocks.
_MIN_CELL = 64


def to_uint8(samples: Tensor) -> npt.NDArray[np.uint8]:
    """Samples (B, C, [F,] H, W) in [-1, 1], clamped, as uint8 (B, [F,] H, W, C)."""
    scaled = ((samples.float() + 1) * 127.5).round().clamp(0, 255)
    return np.asarray(scaled.to("cpu", torch.uint8).movedim(1, -1).numpy())


def save(sample: npt.NDArray[np.uint8], stem: Path, *, frames_per_second: float) -> None:
    """Writes an image (H, W, C) as stem.png, a video (F, H, W, C) as stem.mp4; uint8, C 1 or 3.

    Raises:
        OSError: the file cannot be written; names it.
    """
    if sample.ndim == 3:
        # One of very many files: waiting for the disk after each would take longer than drawing it.
        write_whole(stem.with_suffix(".png"), _png(sample), is_flushed=False)
        return
    # Imported here, because only runs with videos need its package.
    from speedit_plugins.trainer.data.videos.files import write_mp4

    write_mp4(stem.with_suffix(".mp4"), torch.from_numpy(sample), fps=frames_per_second)


def save_png(image: npt.NDArray[np.uint8], path: Path) -> None:
    """Writes one uint8 image (H, W, C), C 1 to 4, as PNG, whole or not at all.

    Raises:
        OSError: the file cannot be written; names it.
    """
    write_whole(path, _png(image))


def save_with_hole(image: npt.NDArray[np.uint8], hole: npt.NDArray[np.bool_], path: Path) -> None:
    """Writes an image (H, W, C) as PNG, transparent in the hole (H, W), where its pixels become mid-grey."""
    shown = np.where(hole[..., None], np.uint8(128), image)
    alpha = np.where(hole, 0, 255).astype(np.uint8)[..., None]
    save_png(np.concatenate([shown, alpha], axis=-1), path)


def save_grid(
    images: Tensor, path: Path, *, columns: int, titles: Sequence[str] = (), row_titles: Sequence[str] = ()
) -> None:
    """Writes images (B, C, H, W) in [-1, 1] as one PNG, row by row. Small images are enlarged.

    Args:
        titles: written above the columns, wrapped.
        row_titles: written beside the rows, wrapped.
    """
    grid = _grid(to_uint8(images), columns)
    save_png(_fully_titled(grid, columns, titles, row_titles), path)


def save_videos(
    videos: Tensor,
    path: Path,
    *,
    columns: int,
    titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    frames_per_second: float,
) -> None:
    """Writes videos (B, C, F, H, W) in [-1, 1] as a moving grid, MP4 and GIF, and as a PNG of their frames.

    The PNG has a row per video, up to eight frames of it from left to right, its titles on the left.

    Args:
        titles, row_titles: see `save_grid`.
    """
    from speedit_plugins.trainer.data.videos.files import write_gif, write_mp4

    frames = to_uint8(videos)  # (B, F, H, W, C)
    grids = [_grid(frames[:, f], columns) for f in range(frames.shape[1])]
    moving = np.stack([_fully_titled(grid, columns, titles, row_titles) for grid in grids])
    write_mp4(path.with_suffix(".mp4"), torch.from_numpy(moving), fps=frames_per_second)
    write_gif(path.with_suffix(".gif"), torch.from_numpy(moving), fps=frames_per_second)
    shown = np.linspace(0, frames.shape[1] - 1, min(8, frames.shape[1])).round().astype(int)
    still = frames[:, shown].reshape(-1, *frames.shape[2:])
    grid = _grid(still, len(shown))
    of_rows = []
    for number in range(len(frames)) if titles or row_titles else ():
        own = [row_titles[number // columns]] if row_titles else []
        of_rows.append(": ".join([*own, *([titles[number % columns]] if titles else [])]))
    save_png(_fully_titled(grid, columns, (), of_rows), path)


def titled_grid(
    cells: npt.NDArray[np.uint8], columns: int, titles: Sequence[str] = (), row_titles: Sequence[str] = ()
) -> npt.NDArray[np.uint8]:
    """Cells (B, H, W, C), row by row, as one image (H', W', C), with titles above columns and beside rows.

    Small cells are enlarged. With titles, C becomes 3.
    """
    return _fully_titled(_grid(cells, columns), columns, titles, row_titles)


def _grid(cells: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Cells (B, H, W, C), row by row, as one image (H', W', C)."""
    scale = max(1, _MIN_CELL // cells.shape[1])
    height, width, channels = scale * cells.shape[1], scale * cells.shape[2], cells.shape[3]
    rows = -(-len(cells) // columns)
    gap = 2
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 96, dtype=np.uint8)
    for i, cell in enumerate(cells):
        top, left = (gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap))
        enlarged = _pillow(cell).resize((width, height), Image.Resampling.BICUBIC)
        grid[top : top + height, left : left + width] = np.asarray(enlarged).reshape(height, width, channels)
    return grid


def _titled(grid: npt.NDArray[np.uint8], columns: int, titles: Sequence[str]) -> npt.NDArray[np.uint8]:
    """The grid (H, W, C) below a band with a title for each column. Without titles the grid itself."""
    if not titles:
        return grid
    width, size = grid.shape[1] // columns, 10
    font = ImageFont.load_default(size)
    lines = [_wrapped(title, width - 4, font) for title in titles]
    height = (size + 4) * max(text.count("\n") + 1 for text in lines) + 6
    band = Image.new("RGB", (grid.shape[1], height), "white")
    pen = ImageDraw.Draw(band)
    for column, text in enumerate(lines):
        pen.multiline_text((column * width + 3, 3), text, fill="black", font=font, spacing=2)
    whole = np.concatenate([np.asarray(band), np.broadcast_to(grid, (*grid.shape[:2], 3))])
    return np.ascontiguousarray(whole)


def _fully_titled(
    grid: npt.NDArray[np.uint8], columns: int, titles: Sequence[str], row_titles: Sequence[str]
) -> npt.NDArray[np.uint8]:
    """The grid (H, W, C) with titles above its columns and beside its rows; without any the grid itself."""
    whole = _titled(grid, columns, titles)
    if not row_titles:
        return whole
    beside = _row_titles(grid.shape[0], row_titles)
    above = np.full((whole.shape[0] - grid.shape[0], *beside.shape[1:]), 255, dtype=np.uint8)
    colored = np.broadcast_to(whole, (*whole.shape[:2], 3))
    return np.concatenate([np.concatenate([above, beside]), colored], axis=1)


def _row_titles(height: int, titles: Sequence[str]) -> npt.NDArray[np.uint8]:
    """A white column (height, W, 3) with one title per row; rows have equal heights."""
    size, width = 10, 2 * _MIN_CELL
    font = ImageFont.load_default(size)
    column = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(column)
    for row, title in enumerate(titles):
        text = _wrapped(title, width - 6, font)
        pen.multiline_text((3, row * height // len(titles) + 4), text, fill="black", font=font, spacing=2)
    return np.asarray(column)


def _wrapped(title: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The title in as few lines as fit into `width` pixels. A line has at least 4 letters."""
    lines = [title]
    for letters in range(len(title), 3, -1):
        if all(font.getlength(line) <= width for line in lines):
            break
        lines = textwrap.wrap(title, letters)
    return "\n".join(lines)


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    _pillow(image).save(content, "PNG")
    return content.getvalue()


def _pillow(image: npt.NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def save_loss_curve(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Plots the logged losses against the step: weighted, raw, under uniform timesteps, and of validation.

    The axis is logarithmic, or linear if a loss is not positive: accelerations make some negative.

    Args:
        rows: lines of metrics.jsonl, each with `step` and the losses.
        path: the PNG file to write.
        title: title of the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    curves = {
        "uniform_mse": "mse, corrected to uniform timesteps",
        "mse": "mse at the drawn timesteps",
        "loss": "training loss (weighted)",
        "val_loss": "validation: mse of the averaged weights",
    }
    for key, label in curves.items():
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    is_positive = all(row[key] is None or row[key] > 0 for key in curves for row in rows if key in row)
    axes.set(xlabel="training step", ylabel="loss", title=title, yscale="log" if is_positive else "linear")
    for axis_part in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_part("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    write_whole(path, content.getvalue())
