from pathlib import Path

import numpy as np
import torch
from PIL import Image

from speedit_plugins.engine.pictures import save_grid, save_loss_curve, save_png, to_uint8


def test_uint8_is_the_rounded_affine_map_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 127 / 127.5 - 1]).reshape(1, 1, 2, 3)
    # (x + 1) * 127.5: -1 -> 0, 0 -> 127.5, which rounds to even 128, 1 -> 255.
    assert to_uint8(values).shape == (1, 2, 3, 1)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 127]


def test_a_grid_holds_each_image_enlarged_in_reading_order(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 1.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 32, 32)
    save_grid(images, tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    # Cells of 32 pixels are doubled to 64, with 2 pixels before, between and after: 2 rows, 2 columns.
    assert grid.shape == (2 * 66 + 2, 2 * 66 + 2)
    assert (grid[2:66, 2:66] == 0).all()
    assert (grid[2:66, 68:132] == 255).all()
    assert (grid[68:132, 2:66] == 128).all()


def test_colour_and_grey_images_are_written_as_they_are(tmp_path: Path) -> None:
    colour = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for image in (colour, colour[..., :1]):
        save_png(image, tmp_path / "x.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")).reshape(image.shape), image)


def test_the_loss_curve_is_a_picture_of_the_logged_steps(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1 / s, "mse": 2 / s, "uniform_mse": 3 / s} for s in (10, 20, 30)]
    save_loss_curve(rows, tmp_path / "loss.png", title="a run")
    drawn = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert drawn.shape[0] > 300
    # Three curves in three colours beside black text on white.
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 3
