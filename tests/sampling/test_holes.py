"""Inpainting of the dataset: holes, fills, grids, and the metrics of the pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, small_config

from speedit_plugins.cli import main
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.evaluation.npz import read_npz
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.sampling.inpainting.holes import Holes

DIGITS, EMOJI = "configs/image/digits/speedit.yaml", "configs/text_to_image/emoji_pixart.yaml"
HOLES = {"inpainting": "RandomMasks", "max_training_steps": 2, "data__num_workers": 0}


def run(phase: str, folder: Path, **changes: Any) -> int:
    return main(["-c", DIGITS, "-p", phase, *arguments(folder, **{**HOLES, **changes})])


def error(capsys: pytest.CaptureFixture[str], phase: str, folder: Path, **changes: Any) -> str:
    capsys.readouterr()
    assert run(phase, folder, **changes) == 2
    return capsys.readouterr().err


def test_images_and_holes_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    few, more, other = (
        Holes(small_config(tmp_path, "inference", **HOLES, seed=seed), num_samples=number)
        for number, seed in ((3, 0), (1797, 0), (3, 1))
    )
    # Evenly over the data, whatever their order.
    assert few.items.tolist() == [0, 599, 1198]
    given, again = few.at(few.items), more.at(more.items[few.items])
    assert torch.equal(given.masks, again.masks)
    assert torch.equal(given.samples, again.samples)
    assert given.labels is not None
    plain = [Digits(image_size=8).load(index, torch.Generator()) for index in few.items.tolist()]
    assert torch.equal(given.samples, torch.stack([item["image"] for item in plain]))
    assert given.labels.tolist() == [item["label"] for item in plain]
    assert not torch.equal(given.masks, other.at(other.items).masks)
    assert (given.masks.flatten(1).sum(dim=1) > 0).all()


def test_fills_are_written_beside_what_was_given_and_are_measured_in_pairs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A grid in training: a row per image, of image, hole and fill.
    assert run("train", tmp_path, sample_every=2, samples_per_class=3, sample_classes="[]") == 0
    with Image.open(tmp_path / "grids" / "step_0000002.png") as grid:
        assert grid.size == (3 * 66 + 2, 3 * 66 + 2)
    assert run("sample", tmp_path, samples_per_class=2, sample_classes="[]") == 0
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (3 * 66 + 2, 2 * 66 + 2)

    assert run("inference", tmp_path, num_samples=5, per_proc_batch_size=2) == 0
    said = capsys.readouterr().out
    (npz,) = (tmp_path / "inference").glob("*.npz")
    folder, masked = npz.with_suffix(""), npz.with_name(f"{npz.stem}_masked")
    assert f"  with holes   {masked}/" in said
    assert {path.name for path in (tmp_path / "inference").iterdir()} == {folder.name, npz.name, masked.name}
    fills = read_npz(npz)
    names = [f"{i:06d}.png" for i in range(5)]
    assert [path.name for path in sorted(folder.iterdir())] == names
    assert [path.name for path in sorted(masked.iterdir())] == names
    holes = Holes(small_config(tmp_path, "inference", **HOLES), num_samples=5)
    given = holes.at(holes.items)
    originals, inside = images.to_uint8(given.samples), given.masks[:, 0].numpy() > 0
    assert np.array_equal(fills[~inside], originals[~inside])
    assert not np.array_equal(fills[inside], originals[inside])
    shown = np.stack([np.asarray(Image.open(masked / name)) for name in names])
    assert np.array_equal(shown[..., 1], np.where(inside, 0, 255))
    # What was in the hole is not there.
    assert np.array_equal(shown[..., 0], np.where(inside, 128, originals[..., 0]))
    assert "inference would write over" in error(capsys, "inference", tmp_path, num_samples=5)

    assert run("test", tmp_path, evaluation__metrics="[fid,psnr,hole_error]") == 0
    figures = json.loads((tmp_path / "test.json").read_text())["figures"]
    assert set(figures) == {"fid[digit_classifier]", "psnr", "hole_error"}
    off = np.abs(fills.astype(float) - originals)[..., 0]
    means = [off[i][inside[i]].mean() for i in range(5)]
    assert figures["hole_error"]["value"] == pytest.approx(np.mean(means))
    decibels = [10 * np.log10(255**2 / (off[i] ** 2).mean()) for i in range(5)]
    assert figures["psnr"]["value"] == pytest.approx(np.mean(decibels))
    assert figures["psnr"]["num_reference"] == 5

    # Other holes, other pairs.
    pairs = {"evaluation__metrics": "[psnr]", "samples": npz}
    assert "is no fill of the hole in its image" in error(capsys, "test", tmp_path, **pairs, seed=1)
    said = error(capsys, "test", tmp_path, evaluation__metrics="[ssim]")
    assert "ssim needs images of 11 x 11 pixels or more, got 8 x 8" in said
    assert "wanted inpainting" in error(capsys, "test", tmp_path, **pairs, inpainting="null")
    assert "reference has no effect on psnr" in error(capsys, "test", tmp_path, **pairs, reference=npz)


def test_what_cannot_be_filled_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", tmp_path) == 0
    said = error(capsys, "inference", tmp_path, num_samples=1798)
    assert "inpainting fills each image of the dataset once: wanted at most its 1797 images, got 1798" in said
    assert not (tmp_path / "inference").exists()
    said = error(capsys, "sample", tmp_path, inpaint_image="photo.png", sample_classes="[1]")
    assert "inpaint_mask: wanted a path: the image and the mask of its hole, or neither" in said


def test_a_hole_is_filled_under_the_images_own_caption(tmp_path: Path) -> None:
    size = "block_out_channels: [32, 32], layers_per_block: 1, text_width: 384, text_length: 16"
    options = [
        f"experiment_dir={tmp_path}",
        f"model={{type: UNet, {size}}}",
        "inpainting=RandomMasks",
        "max_training_steps=1",
        "optimizer.warmup_steps=0",
        "data.batch_size=2",
        "data.num_workers=0",
        "num_samples=3",
        "sampler.num_steps=2",
        "sample_prompts=[]",
        "guidance_scale=2",
    ]
    for phase in ("train", "inference"):
        assert main(["-c", EMOJI, "-p", phase, *options]) == 0
    (table,) = (tmp_path / "inference").glob("*/captions.jsonl")
    found = [json.loads(line) for line in table.read_text().splitlines()]
    holes = Holes(load_config(EMOJI, "inference", options), num_samples=3)
    assert [row["caption"] for row in found] == holes.at(holes.items).captions
    assert [row["file_name"] for row in found] == ["000000.png", "000001.png", "000002.png"]
