"""Sides and frames that do not fit model and encoder are found before the first step, with their key."""

from pathlib import Path

import pytest
from runs import arguments
from saved_models import save_autoencoder

from speedit_plugins.cli import main
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.sides import check_frames, check_sides, shapes_of, stated_patch

DIGITS = "configs/image/digits/speedit.yaml"


def said(phase: str, folder: Path, capfd: pytest.CaptureFixture[str], *options: str) -> str:
    """The error of a run."""
    assert main(["-c", DIGITS, "-p", phase, *arguments(folder), *options]) == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_side_that_does_not_fit_is_told_at_the_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], dry: list[str]
) -> None:
    # Pixels in patches of 4.
    error = said("train", tmp_path, capfd, "image_size=10", *dry)
    assert (
        "image_size needs sides that are multiples of 4, the encoder's 1 times the model's patch of 4"
        in error
    )
    assert "got 10; nearest: 8 or 12" in error
    # Its own folder is not even looked at: the sides are wrong whatever is there.
    folder = "data.dataset={type: ImageFolder, root: x, image_size: 8, buckets: [[8, 8], [8, 6]]}"
    error = said("train", tmp_path, capfd, folder, *dry)
    assert "data.dataset.buckets[1] [8, 6] needs sides that are multiples of 4" in error
    assert "got 6; nearest: 4 or 8" in error
    # So is what the loss is measured on, before a step is trained.
    validation = "data.validation={type: ImageFolder, root: x, buckets: [[8, 8], [8, 6]]}"
    error = said("train", tmp_path, capfd, "validate_every=5", validation, *dry)
    assert "data.validation.buckets[1] [8, 6] needs sides that are multiples of 4" in error


def test_an_encoder_counts_with_its_downsampling(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_autoencoder(tmp_path / "vae")
    encoder = ["encoder={type: AutoencoderKL, path: %s}" % (tmp_path / "vae"), "model.in_channels=4"]
    error = said("train", tmp_path, capfd, *encoder, "image_size=12", "model.input_size=6")
    assert (
        "image_size needs sides that are multiples of 8, the encoder's 2 times the model's patch of 4"
        in error
    )
    assert "got 12; nearest: 8 or 16" in error
    # Without the encoder's weights, from the sizes of the config.
    error = said("train", tmp_path, capfd, *encoder, "image_size=12", "model.input_size=6", "--dry-run")
    assert "the encoder's 2 times the model's patch of 4" in error
    error = said("train", tmp_path, capfd, *encoder, "image_size=13", "model.input_size=6", "--dry-run")
    assert "image_size needs a multiple of model.input_size 6, the side of a latent, got 13" in error


@pytest.mark.parametrize(
    ("section", "patch"),
    [
        ({"type": "DiT-XL/4"}, 4),
        ({"type": "DiT", "patch_size": 3}, 3),
        ({"type": "PixArt"}, 2),
        ({"type": "PixArt", "path": "x"}, 1),
        ({"type": "UNet"}, 1),
        ({"type": "nothing like it"}, 1),
    ],
)
def test_the_patch_is_read_from_the_section_or_the_type(section: dict[str, object], patch: int) -> None:
    assert stated_patch(section) == patch


def test_the_least_side_has_no_side_below_it() -> None:
    with pytest.raises(ValueError, match=r"got 7; nearest: 16$"):
        check_sides({"image_size": (7, 16)}, downsample=8, patch=2)
    check_sides({"image_size": (32, 16)}, downsample=8, patch=2)


def test_frames_of_a_bucket_fit_the_model() -> None:
    model = Latte(8, 4, num_frames=4, hidden_size=8, depth=2, num_heads=2)
    shapes = shapes_of(8, {"data.dataset.buckets": [[1, 8, 8], [4, 8, 8], [8, 8, 8]]})
    with pytest.raises(
        ValueError, match=r"^data.dataset.buckets\[2\] \[8, 8, 8\] needs 1 to 4 frames, .* got 8$"
    ):
        check_frames(shapes, model)
    del shapes["data.dataset.buckets[2] [8, 8, 8]"]
    check_frames(shapes, model)
    # What is no list of sides is for the dataset to refuse.
    assert list(shapes_of(8, {"buckets": [[8, True], "8x8", 3, [8]]})) == ["image_size"]
    assert list(shapes_of(8, {"buckets": "8x8"})) == ["image_size"]
