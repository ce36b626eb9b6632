"""Samples that are not finite end as an error or a counted line, never as a set of black images."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, small_trainer
from safetensors.torch import save_file
from saved_models import save_text_encoder, save_tokenizer
from torch import Tensor

from speedit_plugins.cli import main
from speedit_plugins.trainer.evaluation.npz import write_npz
from speedit_plugins.trainer.models.pretrained.text import TextEncoder
from speedit_plugins.trainer.sampling.finite import crossed, not_finite, of_one_value
from speedit_plugins.trainer.sampling.generator import SampleGenerator

CONFIG = ["-c", "configs/image/digits/speedit.yaml"]


def speedit(phase: str, folder: Path, **changes: Any) -> int:
    return main([*CONFIG, "-p", phase, *arguments(folder, **changes)])


def save_weights(folder: Path, value: float, **changes: Any) -> Path:
    """A file of a small model whose last layer has this value."""
    model = small_trainer(folder, **changes).model
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights["final_layer.linear.bias"].fill_(value)
    save_file(weights, folder / "w.safetensors")
    return folder / "w.safetensors"


def with_nan(monkeypatch: pytest.MonkeyPatch, rows: slice) -> None:
    """Lets the samples at these rows of each batch be NaN."""
    draw = SampleGenerator.draw

    def spoiled(self: SampleGenerator, *args: Any, **options: Any) -> Tensor:
        samples = draw(self, *args, **options)
        samples[rows] = torch.nan
        return samples

    monkeypatch.setattr(SampleGenerator, "draw", spoiled)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 6), (3, 2, 4, 4)])
def test_a_cross_replaces_what_is_not_finite_alone(shape: tuple[int, ...]) -> None:
    samples = torch.rand(4, *shape)
    samples[1].view(-1)[3] = torch.nan
    samples[2].view(-1)[0] = -torch.inf
    assert not_finite(samples).tolist() == [False, True, True, False]
    shown, num_bad = crossed(samples)
    assert num_bad == 2
    assert torch.equal(shown[[0, 3]], samples[[0, 3]])
    # White on black, symmetric from left to right, and never all black.
    assert set(shown[1].unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(shown[1], shown[1].flip(-1))
    assert torch.equal(shown[1], shown[2])
    assert crossed(samples[[0, 3]])[1] == 0


def test_images_of_one_value_are_counted() -> None:
    images = torch.zeros(3, 2, 2, 1, dtype=torch.uint8)
    images[1, 0, 0, 0] = 1
    images[2] = 255
    assert of_one_value(images) == 2
    # A single pixel has one value by nature.
    assert of_one_value(torch.zeros(3, 1, 1, 3, dtype=torch.uint8)) == 0


# 3e38 is finite in float32, and twice as much is not.
@pytest.mark.parametrize("phase", ["sample", "inference"])
def test_weights_that_overflow_give_an_error_and_no_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: str
) -> None:
    file = save_weights(tmp_path, 3e38)
    changes = {
        "num_samples": 3,
        "per_proc_batch_size": 2,
        "guidance_scale": 3,
        "sampler__clip_sample": "false",
    }
    assert speedit(phase, tmp_path, ckpt_path=file, **changes) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert " images are not finite: precision fp32, guidance_scale 3, weights of " in said
    assert str(file) in said
    assert "wanted a guidance_scale nearer to 1 or sampler.clip_sample true or another checkpoint" in said
    assert not (tmp_path / "samples.png").exists()
    assert not list(tmp_path.glob("inference/*.npz"))
    assert all(path.suffix == ".tmp" for path in tmp_path.glob("inference/*"))
    assert not list(tmp_path.glob("inference/*/*.png"))


@pytest.mark.parametrize("phase", ["sample", "inference"])
def test_weights_that_are_not_finite_are_an_error_before_sampling(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], phase: str
) -> None:
    file = save_weights(tmp_path, torch.nan)
    assert speedit(phase, tmp_path, ckpt_path=file) == 2
    assert "has weights that are not finite in 1 of " in capfd.readouterr().err
    assert speedit("train", tmp_path / "tuned", pretrained=file) == 2
    assert "has weights that are not finite in 1 of " in capfd.readouterr().err
    export = runpy.run_path("tools/export.py")["main"]
    given = [
        *CONFIG[:2],
        "--model-only",
        "--out",
        str(tmp_path / "out"),
        *arguments(tmp_path, ckpt_path=file),
    ]
    assert export([*given, "sampler.type=ddim_leading"]) == 2
    assert "has weights that are not finite in 1 of " in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_few_bad_samples_are_crossed_and_counted_in_a_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = save_weights(tmp_path, 0.0)
    options = {"ckpt_path": file, "sample_classes": "[1, 2]", "samples_per_class": 1}
    assert speedit("sample", tmp_path, **options) == 0
    before = np.asarray(Image.open(tmp_path / "samples.png"))
    with_nan(monkeypatch, slice(1, 2))
    assert speedit("sample", tmp_path, **options) == 0
    said = capfd.readouterr().out
    assert "warning: 1 of 2 images are not finite" in said
    assert "a cross marks them" in said
    found = np.asarray(Image.open(tmp_path / "samples_0001.png"))
    # Cells of 64 pixels with gaps of 2: the second one has the cross.
    assert np.array_equal(found[:, :66], before[:, :66])
    assert found[2, 68] > 200
    assert found[34, 68 + 2] < 50
    # One of them is too many in a set that is scored.
    assert speedit("inference", tmp_path, ckpt_path=file, num_samples=3) == 2
    assert "inference stops without a set of samples: 1 of 3 images" in capfd.readouterr().err


def test_a_training_goes_on_after_a_grid_without_a_finite_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_nan(monkeypatch, slice(None))
    changes = {"max_training_steps": 3, "sample_every": 2, "sample_classes": "[1]", "samples_per_class": 2}
    assert speedit("train", tmp_path, **changes) == 0
    said = capfd.readouterr().out
    assert "warning: 2 of 2 images are not finite" in said
    assert "weights of step 2;" in said
    assert (tmp_path / "checkpoints" / "step_0000003").is_dir()
    assert (tmp_path / "grids" / "step_0000002.png").exists()


def test_fills_that_are_not_finite_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, level in (("image", 128), ("mask", 255)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / f"{name}.png")
    changes: dict[str, Any] = {"inpainting": "RandomMasks", "max_training_steps": 1}
    assert speedit("train", tmp_path, **changes) == 0
    with_nan(monkeypatch, slice(None))
    given = {"inpaint_image": tmp_path / "image.png", "inpaint_mask": tmp_path / "mask.png"}
    assert speedit("sample", tmp_path, **changes, **given, sample_classes="[1]", samples_per_class=2) == 2
    assert "2 of 2 images are not finite" in capfd.readouterr().err
    # So are those of holes in the dataset, also in a set that is scored.
    assert speedit("sample", tmp_path, **changes, sample_classes="[]", samples_per_class=2) == 2
    assert "2 of 2 images are not finite" in capfd.readouterr().err
    assert not (tmp_path / "samples.png").exists()
    assert speedit("inference", tmp_path, **changes, num_samples=3) == 2
    assert "inference stops without a set of samples: 3 of 3 images" in capfd.readouterr().err
    assert not list((tmp_path / "inference").glob("*.npz"))
    # A training goes on, and marks them.
    changes |= {"max_training_steps": 2, "sample_every": 2, "sample_classes": "[]", "samples_per_class": 2}
    assert speedit("train", tmp_path, **changes) == 0
    assert "warning: 2 of 2 images are not finite" in capfd.readouterr().out
    with Image.open(tmp_path / "grids" / "step_0000002.png") as grid:
        assert np.asarray(grid)[2, -4] > 200


def test_a_set_of_one_value_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Every pixel is far above 1, and is clamped to white.
    process = {"diffusion__learn_sigma": "false", "diffusion__prediction_type": "v"}
    file = save_weights(tmp_path, -1e6, **process)
    changes = {"num_samples": 3, "sampler__clip_sample": "false", **process}
    assert speedit("inference", tmp_path, ckpt_path=file, **changes) == 0
    assert "warning: 3 of 3 images have the same value in every pixel" in capfd.readouterr().out
    # So is that of another program.
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    images[:7] = 0
    write_npz(tmp_path / "theirs.npz", images)
    assert speedit("test", tmp_path, samples=tmp_path / "theirs.npz", evaluation__metrics="[fid]") == 0
    said = capfd.readouterr().out
    assert f"warning: 7 of 40 in {tmp_path}/theirs.npz have the same value in every pixel" in said


def test_a_text_encoder_that_overflows_is_an_error(tmp_path: Path) -> None:
    save_text_encoder(tmp_path, "t5")
    save_tokenizer(tmp_path)
    encoder = TextEncoder(str(tmp_path), max_length=4, dtype="float16")
    assert encoder.encode(["a red heart"])["tokens"].isfinite().all()
    with torch.no_grad():
        encoder.model.encoder.final_layer_norm.weight.fill_(torch.inf)
    with pytest.raises(
        ValueError, match=r"not finite in float16.*wanted text_encoder.dtype float32 or bfloat16"
    ):
        encoder.encode(["a red heart"])
