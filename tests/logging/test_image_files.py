from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import file_size_limit
from torch import Tensor

from speedit_plugins.trainer.data.videos.files import VideoHeader, read_frames, read_header
from speedit_plugins.trainer.logging.images import (
    save,
    save_grid,
    save_loss_curve,
    save_png,
    save_videos,
    to_uint8,
)


def test_uint8_is_the_rounded_affine_map_and_clamps() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, 127 / 127.5 - 1]).reshape(1, 1, 2, 3)
    # (x + 1) * 127.5: -1 -> 0, 0 -> 127.5 -> 128 (rounded to even), 1 -> 255.
    assert to_uint8(values).shape == (1, 2, 3, 1)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 127]


def test_a_grid_holds_each_image_enlarged_in_reading_order(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 1.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 1, 32, 32)
    save_grid(images, tmp_path / "grid.png", columns=2)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    # Cells of 32 pixels are doubled to 64, with 2 pixels before, between and after. 2 rows and 2 columns.
    assert grid.shape == (2 * 66 + 2, 2 * 66 + 2)
    assert (grid[2:66, 2:66] == 0).all()
    assert (grid[2:66, 68:132] == 255).all()
    assert (grid[68:132, 2:66] == 128).all()


def test_colour_and_grey_images_are_written_as_they_are(tmp_path: Path) -> None:
    colour = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    for image in (colour, colour[..., :1]):
        save_png(image, tmp_path / "x.png")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x.png")).reshape(image.shape), image)


def test_the_loss_curve_is_an_image_of_the_logged_steps(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": 1 / s, "mse": 2 / s, "uniform_mse": 3 / s} for s in (10, 20, 30)]
    save_loss_curve(rows, tmp_path / "loss.png", title="a run")
    drawn = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert drawn.shape[0] > 300
    # Three curves in three colours, and black text on white.
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) > 3


def test_a_loss_that_is_not_positive_has_a_linear_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scales: list[str] = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *_, **__: scales.append(figure.axes[0].get_yscale()),
    )
    for last in (0.5, None, 0.0, -0.5):
        rows = [{"step": 1, "loss": 1.0, "mse": 1.0}, {"step": 2, "loss": last, "mse": 0.5}]
        save_loss_curve(rows, tmp_path / "loss.png", title="a run")
    assert scales == ["log", "log", "linear", "linear"]


def test_titles_stand_above_their_columns(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 64, 64)
    save_grid(images, tmp_path / "plain.png", columns=2)
    save_grid(images, tmp_path / "titled.png", columns=2, titles=["", "a long title that has to be wrapped"])
    plain, titled = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "titled"))
    band = titled[: len(titled) - len(plain)]
    assert np.array_equal(titled[len(band) :], plain)
    # The title is black on white, has several lines, and is over the second column alone.
    assert (band[:, :66] == 255).all()
    rows_with_ink = (band[:, 66:] < 128).any(axis=(1, 2))
    assert np.count_nonzero(np.diff(rows_with_ink.astype(int)) == 1) > 1


def test_a_title_keeps_to_its_own_column(tmp_path: Path) -> None:
    save_grid(
        torch.zeros(2, 1, 16, 16),
        tmp_path / "narrow.png",
        columns=2,
        titles=["a handwritten 0 moving left", ""],
    )
    image = np.asarray(Image.open(tmp_path / "narrow.png"))
    # Cells have 64 pixels, with lines of 2 between them. The title's band ends where the grid's grey begins.
    band = image[: image.shape[0] - (64 + 4)]
    assert (band[:, :66] < 255).any()
    assert (band[:, 66:] == 255).all()


def test_videos_become_a_moving_grid_and_a_row_of_frames_each(tmp_path: Path) -> None:
    # Video v has the constant grey level 128 + 40 v, except for a white last frame.
    videos = torch.zeros(2, 1, 4, 64, 64)
    videos[1] = 40 / 127.5
    videos[:, :, 3] = 1.0
    save_videos(videos, tmp_path / "v.png", columns=2, frames_per_second=5)
    still = np.asarray(Image.open(tmp_path / "v.png"))
    assert still.shape == (2 * 66 + 2, 4 * 66 + 2)
    assert (still[68:132, 2:66] == 168).all()
    assert (still[68:132, 200:264] == 255).all()
    with Image.open(tmp_path / "v.gif") as gif:
        # The first three frames are equal, so the GIF has them as one.
        gif.seek(gif.n_frames - 1)
        assert (np.asarray(gif.convert("L"))[2:66, 2:66] == 255).all()
    frames = read_frames(tmp_path / "v.mp4", range(4), num_frames=4)
    assert read_header(tmp_path / "v.mp4").num_frames == 4
    for f, frame in enumerate(frames):
        # The middles of the two videos' cells. Compression keeps them within 2 levels.
        middles = np.asarray(frame.convert("L")).astype(int)[34, [34, 100]]
        assert np.abs(middles - ([255, 255] if f == 3 else [128, 168])).max() <= 2


def test_rows_of_videos_have_their_titles_on_the_left(tmp_path: Path) -> None:
    videos = torch.zeros(3, 1, 2, 32, 32)
    save_videos(videos, tmp_path / "v.png", columns=2, titles=["first", ""], frames_per_second=5)
    still = np.asarray(Image.open(tmp_path / "v.png"))
    assert still.shape == (3 * 66 + 2, 128 + 2 * 66 + 2, 3)
    has_ink = [bool((still[top : top + 60, :128] < 255).any()) for top in (2, 68, 134)]
    assert has_ink == [True, False, True]
    assert (still[2:66, 130:194] == 128).all()


def test_rows_of_a_moving_grid_have_titles_too(tmp_path: Path) -> None:
    videos = torch.zeros(4, 1, 2, 32, 32)
    options = {"columns": 2, "frames_per_second": 5, "titles": ["", "original"]}
    save_videos(videos, tmp_path / "plain.png", **options)  # type: ignore[arg-type]  # of several types
    save_videos(videos, tmp_path / "rows.png", row_titles=["first", ""], **options)  # type: ignore[arg-type]  # as above
    with Image.open(tmp_path / "plain.gif") as gif, Image.open(tmp_path / "rows.gif") as titled:
        plain, rows = (np.asarray(each.convert("L")) for each in (gif, titled))
    assert rows.shape == (plain.shape[0], 128 + plain.shape[1])
    assert np.array_equal(rows[:, 128:], plain)
    # A row's title begins at its top, below the band of the columns' titles.
    first = plain.shape[0] - (2 * 66 + 2)
    assert (rows[:first, :128] == 255).all()
    assert (rows[first : first + 66, :128] < 255).any()
    assert (rows[first + 66 :, :128] == 255).all()
    # In the picture each row is one video: "first: ", "first: original", ": ", ": original".
    still = np.asarray(Image.open(tmp_path / "rows.png"))
    ink = [int((still[top : top + 60, :128] < 128).any(axis=2).sum()) for top in (2, 68, 134, 200)]
    assert ink[1] > max(ink[0], ink[3])
    assert min(ink[0], ink[3]) > ink[2]


def test_a_sample_is_a_png_or_an_mp4(tmp_path: Path) -> None:
    save(np.zeros((4, 4, 3), np.uint8), tmp_path / "a", frames_per_second=8)
    save(np.zeros((3, 4, 4, 3), np.uint8), tmp_path / "b", frames_per_second=8)
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.mp4"}
    assert read_header(tmp_path / "b.mp4") == VideoHeader(num_frames=3, height=4, width=4)


def test_a_full_disk_leaves_the_earlier_picture_and_names_the_file(tmp_path: Path) -> None:
    small, large = torch.zeros(1, 3, 64, 64), torch.rand(1, 3, 64, 64)
    rows = [{"step": step, "loss": 1.0} for step in (1, 2)]
    path = tmp_path / "x.png"
    writes: list[Callable[[Tensor], None]] = [
        lambda image: save_grid(image, path, columns=1),
        lambda image: save(to_uint8(image)[0], tmp_path / "x", frames_per_second=1),
        lambda image: save_loss_curve(rows, path, title="a run"),
    ]
    for write in writes:
        save_grid(small, path, columns=1)
        before = path.read_bytes()
        with (
            file_size_limit(1000),
            pytest.raises(OSError, match=rf"\] cannot write {path}: File too large$"),
        ):
            write(large)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
