"""Folders of stages that `tools/export.py --for-loader` writes, against what the runs themselves draw."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascades import DIGITS, STAGES, options_of, train_captioned, train_stages
from exported_runs import EXPORT
from runs import small_config, small_trainer
from safetensors.torch import load_file
from saved_models import TEXT_WIDTH, save_text_encoder, save_tokenizer
from shapes_of_tests import FLOW, POINTS, config_file
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer.evaluation.npz import read_npz
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.sampling.exported_stages import load_stages
from speedit_plugins.trainer.sampling.files.shape_files import read_shapes
from speedit_plugins.trainer.sampling.generator import load_generator
from speedit_plugins.trainer.sampling.super_resolution import cascade, enlargements
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import FromData

GRID = {"sample_classes": "[3, 5]", "samples_per_class": 2, "per_proc_batch_size": 3}


def export(*given: str | Path) -> int:
    return EXPORT["main"](list(map(str, given)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of three trained stages, of 8, 16 and 32 pixels."""
    return train_stages(tmp_path_factory)


@pytest.fixture(scope="module")
def last(runs: list[Path]) -> list[str]:
    """The arguments that draw with the whole cascade."""
    before = {"cascade": f"[{runs[0]},{runs[1]}]"}
    return options_of(runs[2], **STAGES[2], **before, **GRID)


@pytest.fixture(scope="module")
def folder(last: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported cascade, alone at another place than where it was written."""
    written = tmp_path_factory.mktemp("written") / "out"
    assert export(*last, "--for-loader", "--out", written) == 0
    return Path(shutil.move(written, tmp_path_factory.mktemp("moved") / "cascade"))


def test_a_folder_has_the_stages_and_nothing_of_their_trainings(folder: Path, runs: list[Path]) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = ("classes.json", "config.yaml", "model.safetensors")
    stages = {f"stage_{number}/{name}" for number in range(3) for name in own if name != "classes.json"}
    assert names == {"README.md", "stages.json", *stages}
    for number, run in enumerate(runs):
        (kept,) = run.glob("checkpoints/*/ema.safetensors")
        assert_close(
            load_file(folder / f"stage_{number}" / "model.safetensors"), load_file(kept), rtol=0, atol=0
        )
    card = (folder / "README.md").read_text()
    assert "library_name: speedit_plugins\n" in card
    assert "stages([3, 5], seed=0)" in card


def test_stages_draw_the_grid_of_the_phase_sample(
    folder: Path, last: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr(enlargements, "save_columns", lambda columns, *_, **__: shown.extend(columns))
    assert main([*last, "-p", "sample"]) == 0
    stages = load_stages(folder, ["per_proc_batch_size=3"])
    drawn = stages([3, 3, 5, 5], seed=0)
    assert [samples.shape[-1] for samples in drawn] == [8, 16, 32]
    assert len(shown) == 3
    for samples, column in zip(drawn, shown, strict=True):
        assert torch.equal(enlargements.blocks(samples, 32 // samples.shape[-1]), column.clamp(-1, 1))
    # The seed of a call holds for that call alone.
    other = stages(torch.tensor([3, 3, 5, 5]), seed=1)
    assert not any(torch.equal(*pair) for pair in zip(drawn, other, strict=True))
    again = stages(np.array([3, 3, 5, 5]))
    assert all(torch.equal(*pair) for pair in zip(drawn, again, strict=True))


def test_stages_draw_the_set_of_inference_whose_run_is_gone(
    folder: Path, last: list[str], runs: list[Path]
) -> None:
    assert main([*last, "-p", "inference", "seed=4", "num_samples=5"]) == 0
    (npz,) = (runs[2] / "inference").glob("*seed4*.npz")
    lines = (npz.with_suffix("") / "labels.jsonl").read_text().splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    hidden = [run.rename(run.with_name(f"{run.name}_hidden")) for run in runs]
    try:
        drawn = load_stages(folder)(labels, seed=4)
    finally:
        for run in hidden:
            run.rename(run.with_name(run.name.removesuffix("_hidden")))
    assert np.array_equal(images.to_uint8(drawn[-1]), read_npz(npz))


def test_a_single_super_resolution_model_enlarges_images(runs: list[Path], tmp_path: Path) -> None:
    small, out = options_of(runs[1], **STAGES[1], **GRID), tmp_path / "out"
    assert export(*small, "--for-loader", "--out", out) == 0
    assert "stages([3, 5], low_resolution=images, seed=0)" in (out / "README.md").read_text()
    assert main([*small, "-p", "inference", "num_samples=4"]) == 0
    (npz,) = (runs[1] / "inference").glob("*.npz")
    data = FromData(small_config(runs[1], "inference", **STAGES[1]), num_samples=4)
    labels = [data.item(row)["label"] for row in range(4)]
    given = data.at(torch.arange(4))
    (drawn,) = load_stages(out)(labels, low_resolution=given)
    assert np.array_equal(images.to_uint8(drawn), read_npz(npz))


def test_what_does_not_fit_the_model_is_refused(folder: Path, runs: list[Path], tmp_path: Path) -> None:
    single = tmp_path / "single"
    assert export(*options_of(runs[1], **STAGES[1], **GRID), "--for-loader", "--out", single) == 0
    whole, alone = load_stages(folder), load_stages(single)
    small = torch.zeros(1, 1, 8, 8)
    cases: tuple[tuple[Any, tuple[Any, ...], dict[str, Any], str], ...] = (
        (whole, (), {}, r"conditions: wanted a list with a class for each sample, got \(\)"),
        (whole, ("3",), {}, "conditions: wanted a list with a class for each sample, got '3'"),
        (whole, ([10],), {}, r"conditions: wanted classes in \[0, 10\), got 10"),
        (whole, ([3],), {"num_samples": 2}, "num_samples: wanted None, as 1 samples are given, got 2"),
        (whole, ([3],), {"low_resolution": small}, "low_resolution: wanted None: it draws from noise"),
        (alone, ([3],), {}, "low_resolution: wanted images for the first stage to enlarge, got None"),
        (alone, ([3, 4],), {"low_resolution": small}, r"wanted \(2, 1, 8, 8\), got \(1, 1, 8, 8\)"),
        (alone, ([3],), {"low_resolution": small + 2}, r"wanted floats in \[-1, 1\], got torch.float32"),
        (alone, ([3],), {"low_resolution": small.byte()}, r"wanted floats in \[-1, 1\], got torch.uint8"),
        (alone, ([3],), {"low_resolution": small * torch.nan}, r"wanted floats in \[-1, 1\]"),
    )
    for stages, given, named, message in cases:
        with pytest.raises(ValueError, match=message):
            stages(*given, **named)
    with torch.no_grad():
        next(whole.generators[0].model.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="1 of 1 images are not finite: .* weights of .*stage_0"):
        whole([3])


def test_a_folder_that_is_incomplete_or_no_export_is_refused(
    folder: Path, runs: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=f"wanted a folder that tools/export.py --for-loader wrote, got {runs[0]}"
    ):
        load_stages(runs[0])
    copied = shutil.copytree(folder, tmp_path / "copied")
    weights = copied / "stage_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="model.safetensors.* is damaged"):
        load_stages(copied)
    shutil.rmtree(copied / "stage_2")
    with pytest.raises(ValueError, match=r"copied is incomplete: .* got no \['stage_2'\]"):
        load_stages(copied)
    wanted = r'stages.json: wanted {"stages": \[names of folders\]}, as tools/export.py writes it'
    for content, said in (
        ("{", "stages.json is damaged: Expecting"),
        ('{"stages": []}', "copied is incomplete: .* got no stage"),
        *(
            (wrong, wanted)
            for wrong in ("{}", '[{"name": "stage_1"}]', '{"stages": "ab"}', '{"stages": [1]}')
        ),
    ):
        (copied / "stages.json").write_text(content)
        with pytest.raises(ValueError, match=said):
            load_stages(copied)


def test_an_export_that_fails_leaves_nothing(
    last: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    assert export(*last, "--for-loader", "--model-only", "--out", out) == 2
    assert "got --for-loader and --model-only; wanted one of them" in capsys.readouterr().err
    assert export(*last, "--for-loader", "--out", folder) == 2
    assert "--out needs a folder that does not exist" in capsys.readouterr().err
    assert export(*last, "--out", out) == 2
    assert "super-resolution models; --for-loader writes a folder for load_stages" in capsys.readouterr().err
    filling = [
        "-c",
        DIGITS,
        f"experiment_dir={tmp_path / 'none'}",
        "inpainting=RandomMasks",
        "sample_classes=[3]",
    ]
    assert export(*filling, "--for-loader", "--out", out) == 2
    assert "load_stages draws no fills of images; wanted inpainting: null" in capsys.readouterr().err

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setitem(EXPORT["export_stages"].__globals__, "_card", fail)
    assert export(*last, "--for-loader", "--out", out) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_cascade_of_captions_finds_its_text_encoder_where_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, moved = tmp_path / "text", tmp_path / "moved"
    save_text_encoder(text, "bert")
    save_tokenizer(text)
    out = tmp_path / "out"
    text_encoder = f"text_encoder={{type: TextEncoder, path: {text}, max_length: 8}}"
    given = [text_encoder, f"model.text_width={TEXT_WIDTH}", "sample_prompts=[a red heart, green apple]"]
    large = train_captioned(tmp_path, given)
    assert export(*large, "--for-loader", "--out", out) == 0
    assert "stages(['a red heart', 'green apple'], seed=0)" in (out / "README.md").read_text()
    shown: list[Any] = []
    monkeypatch.setattr(enlargements, "save_columns", lambda columns, *_, **__: shown.extend(columns))
    assert main([*large, "samples_per_class=1", "-p", "sample"]) == 0
    text.rename(moved)
    with pytest.raises(ValueError, match=f"no text encoder with a tokenizer found at '{text}'"):
        load_stages(out)
    built = []
    build = cascade.load_generator.__globals__["build"]
    build_text = build.build_text_encoder
    monkeypatch.setattr(build, "build_text_encoder", lambda *given: built.append(given) or build_text(*given))
    stages = load_stages(out, [f"text_encoder.path={moved}"])
    assert len(built) == 1
    for samples, column in zip(stages(["a red heart", "green apple"]), shown, strict=True):
        assert torch.equal(enlargements.blocks(samples, 32 // samples.shape[-1]), column.clamp(-1, 1))
    with pytest.raises(ValueError, match="conditions: wanted a list with a caption for each sample"):
        stages("green apple")


@pytest.mark.parametrize("form", [(), POINTS, (*POINTS, FLOW)], ids=["voxels", "points", "flow"])
def test_shapes_come_out_in_the_units_of_their_data(
    tmp_path: Path, form: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-c", str(config_file(tmp_path)), f"experiment_dir={tmp_path / 'run'}", *form]
    assert main([*given, "-p", "train"]) == 0
    assert export(*given, "--model-only") == 2
    assert "--for-loader writes a folder for load_stages" in capsys.readouterr().err
    assert export(*given, "--for-loader") == 0
    out = tmp_path / "run" / "stages"
    assert (out / "stage_0" / "normalization.json").is_file() == bool(form)
    assert main([*given, "-p", "inference", "num_samples=3"]) == 0
    (made,) = (path for path in (tmp_path / "run" / "inference").iterdir() if path.is_dir())
    labels = [json.loads(line)["class"] for line in (made / "labels.jsonl").read_text().splitlines()]
    assert set(labels) <= {"flat", "tall"}
    (drawn,) = load_stages(out)(labels)
    # The files hold voxels as shares in [0, 1], in single precision.
    assert_close(drawn, read_shapes(made), atol=0 if form else 1e-6, rtol=0)
    if form:
        kept = json.loads((out / "stage_0" / "normalization.json").read_text())
        assert kept == {"mean": [10.0, 20.0, 30.0], "std": 0.5}


def test_adapters_are_merged_and_no_base_is_needed(tmp_path: Path) -> None:
    plain = {"num_classes": 0, "sample_classes": "[]", "guidance_scale": 1.0, "image_size": 8}
    base = small_trainer(tmp_path / "base", **plain).save()
    adapted = options_of(tmp_path / "run", **plain, lora__rank=2, pretrained=base, optimizer__lr=0.01)
    assert main([*adapted, "-p", "train"]) == 0
    assert export(*adapted, "--for-loader", "--out", tmp_path / "out") == 0
    config = small_config(tmp_path / "run", "sample", **plain, lora__rank=2, pretrained=base)
    wanted = load_generator(config)[0].draw(None, 3)
    (first,) = load_stages(tmp_path / "out")(num_samples=3)
    shutil.rmtree(tmp_path / "base")
    (drawn,) = load_stages(tmp_path / "out", ["device=cpu"])(num_samples=3)
    assert torch.equal(first, drawn)
    # The product of the factors is added to the weights, in place of to their outputs.
    assert_close(drawn, wanted.clamp(-1, 1), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="num_samples: wanted an int >= 1, got None"):
        load_stages(tmp_path / "out")()
    with pytest.raises(ValueError, match=r"conditions: wanted none: the model takes none, got \[3\]"):
        load_stages(tmp_path / "out")([3])
