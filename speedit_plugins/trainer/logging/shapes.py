"""Files of shapes: pictures from several sides, a turntable, `.ply` and `.obj`.

Dims: B shapes, R the side of a grid, N points, P the side of a picture.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from speedit_plugins.files import write_whole
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.data.shapes.solid_meshes import mesh_of_voxels
from speedit_plugins.trainer.data.videos.files import write_gif
from speedit_plugins.trainer.logging.images import save_png, titled_grid
from speedit_plugins.trainer.logging.rendering import BACKGROUND, render_points, render_voxels

# From the front, from the front right, and from behind.
VIEWS = (0.0, -60.0, 180.0)
VIEW_NAMES = ("front", "front right", "back")
CELL = 112
# A turn in 2 seconds.
TURN_FRAMES = 24
FRAMES_PER_SECOND = 12.5
TURN_CELL = 80


def save_shapes(
    samples: Tensor,
    path: Path,
    *,
    columns: int,
    titles: Sequence[str] = (),
    normalization: Normalization | None = None,
) -> None:
    """Writes pictures of shapes: a PNG with each from several sides, and a GIF beside it that turns them.

    The PNG has the samples row by row, and a row of pictures for each of VIEWS, with its name. A cross marks
    a shape with values that are not finite. An empty solid is a blank picture.

    Args:
        samples: solids (B, 1, R, R, R) in [-1, 1], or clouds (B, 3, N) in any units.
        path: the PNG's; the GIF has the same name.
        columns: shapes in a row.
        titles: written above the columns, wrapped.
        normalization: of the data of clouds; gives the scale, see `render_points`.

    Raises:
        ValueError: the shape of `samples` is another one.
        OSError: a file cannot be written; names it.
    """
    draw = partial(pictures, samples, normalization=normalization)
    from_sides = [draw(azimuth_degrees=view, size=CELL) for view in VIEWS]
    cells = _row_by_row(from_sides, columns)
    names = [
        f"row {row + 1}, {view}" for row in range(len(cells) // (len(VIEWS) * columns)) for view in VIEW_NAMES
    ]
    save_png(titled_grid(cells, columns, titles, names), path)
    angles = [360.0 * frame / TURN_FRAMES for frame in range(TURN_FRAMES)]
    turning = [draw(azimuth_degrees=angle, size=TURN_CELL) for angle in angles]
    frames = np.stack([titled_grid(cells, columns, titles) for cells in turning])
    write_gif(path.with_suffix(".gif"), torch.from_numpy(frames), fps=FRAMES_PER_SECOND)


def pictures(
    samples: Tensor, *, azimuth_degrees: float, size: int, normalization: Normalization | None = None
) -> npt.NDArray[np.uint8]:
    """A picture of each shape, uint8 (B, P, P, 3), P = `size`; a cross for one that is not finite.

    Args:
        samples: see `save_shapes`.
        azimuth_degrees: how far the shapes are turned about the vertical axis.
        size: P.
        normalization: see `save_shapes`.

    Raises:
        ValueError: the shape of `samples` is another one.
    """
    is_solid = samples.ndim == 5 and samples.shape[1] == 1
    if not is_solid and not (samples.ndim == 3 and samples.shape[1] == 3):
        raise ValueError(f"wanted solids (B, 1, R, R, R) or clouds (B, 3, N), got {tuple(samples.shape)}")
    shapes = samples.detach().cpu()
    is_finite = shapes.isfinite().flatten(1).all(dim=1)
    shown = torch.full((len(shapes), size, size, 3), BACKGROUND, dtype=torch.uint8)
    if is_finite.any():
        render = render_voxels if is_solid else partial(render_points, normalization=normalization)
        shown[is_finite] = render(shapes[is_finite], azimuth_degrees=azimuth_degrees, size=size)
    shown[~is_finite] = _cross(size)
    return np.asarray(shown.numpy())


def save_ply(points: Tensor, path: Path) -> None:
    """Writes a cloud (3, N) as a binary `.ply` with x, y and z as float32.

    Raises:
        ValueError: the shape is wrong, or a value is not finite.
        OSError: the file cannot be written; names it.
    """
    if points.ndim != 2 or points.shape[0] != 3:
        raise ValueError(f"a .ply needs points (3, N), got {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError(f"{path} is not written: it has points that are NaN or infinite")
    rows = np.ascontiguousarray(points.detach().cpu().T.numpy().astype("<f4"))
    axes = "".join(f"property float {axis}\n" for axis in "xyz")
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{axes}end_header\n"
    write_whole(path, head.encode("ascii") + rows.tobytes())


def save_obj(voxels: Tensor, path: Path) -> None:
    """Writes the surface of a solid (1, R, R, R) as `.obj`, a mesh in [-1, 1]; see `mesh_of_voxels`.

    Raises:
        ValueError: the shape is wrong, a value is not finite, or the solid is empty.
        ImportError: scikit-image is missing.
        OSError: the file cannot be written; names it.
    """
    if voxels.ndim != 4 or voxels.shape[0] != 1:
        raise ValueError(f"an .obj needs voxels (1, D, H, W), got {tuple(voxels.shape)}")
    mesh = mesh_of_voxels(voxels[0])
    lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in mesh.triangles.tolist()]
    write_whole(path, ("\n".join(lines) + "\n").encode("ascii"))


def _row_by_row(views: Sequence[npt.NDArray[np.uint8]], columns: int) -> npt.NDArray[np.uint8]:
    """Cells (K, P, P, 3): for each row of samples, a row of cells for each of the views (B, P, P, 3)."""
    missing = -len(views[0]) % columns
    empty = np.full((missing, *views[0].shape[1:]), BACKGROUND, dtype=np.uint8)
    rows = [np.split(np.concatenate([view, empty]), (len(view) + missing) // columns) for view in views]
    return np.concatenate([row for of_row in zip(*rows, strict=True) for row in of_row])


def _cross(size: int) -> Tensor:
    """A grey cross on the background, uint8 (size, size, 3)."""
    line = torch.eye(size, dtype=torch.bool)
    is_line = line | line.flip(0)
    return torch.where(is_line, 96, BACKGROUND).to(torch.uint8)[..., None].expand(-1, -1, 3)
