"""Cascades: stages in a row, in grids and in inference, and what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cascades import STAGES, options_of, train_captioned, train_stages
from PIL import Image
from runs import small_config
from saved_models import TEXT_WIDTH, save_text_encoder, save_tokenizer

from speedit_plugins.cli import main
from speedit_plugins.trainer.data.images.emoji import Emoji
from speedit_plugins.trainer.evaluation.npz import read_npz
from speedit_plugins.trainer.inputs import with_entries
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.low_resolution import enlarged
from speedit_plugins.trainer.sampling.generator import load_generator
from speedit_plugins.trainer.sampling.super_resolution import cascade
from speedit_plugins.trainer.sampling.super_resolution.stage_sets import read_list

CPU = torch.device("cpu")


def run(phase: str, folder: Path, **changes: Any) -> int:
    return main(["-p", phase, *options_of(folder, **changes)])


def pixels_of(folder: Path) -> Any:
    """The grey images of a folder, uint8 (N, H, W), by name."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def error(capsys: pytest.CaptureFixture[str], phase: str, folder: Path, **changes: Any) -> str:
    capsys.readouterr()
    assert run(phase, folder, **changes) == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of three trained stages, of 8, 16 and 32 pixels."""
    return train_stages(tmp_path_factory)


def before(folders: list[Path], last: int) -> dict[str, Any]:
    return {"cascade": f"[{','.join(map(str, folders[:last]))}]"}


def test_each_stage_enlarges_what_the_one_before_it_drew(trained: list[Path]) -> None:
    config = small_config(trained[2], "inference", **STAGES[2], **before(trained, 2))
    assert (
        run("inference", trained[2], **STAGES[2], **before(trained, 2), num_samples=3, per_proc_batch_size=2)
        == 0
    )
    (npz,) = (trained[2] / "inference").glob("*cascade*.npz")
    drawn = read_npz(npz)
    assert drawn.shape == (3, 32, 32, 1)
    rows = [json.loads(line)["label"] for line in (npz.with_suffix("") / "labels.jsonl").open()]

    # By hand, the first batch: what a stage draws, within [-1, 1], is enlarged and noised for the next one.
    label, given = torch.tensor(rows[:2]), None
    for stage in [*cascade.stages_of(config), config]:
        generator = load_generator(stage)[0]
        condition: Any = label
        if given is not None:
            level = stage.sampler.augmentation
            inputs = cascade.inputs_of(cascade.FromStage(generator, None, num_samples=3), stage, generator)  # type: ignore[arg-type]  # it is not drawn with
            seeds = [cascade.stream_seed(stage.seed, 9, row) for row in range(2)]
            draws = [torch.Generator().manual_seed(seed) for seed in seeds]
            entries = inputs.maker.of(given, torch.full((2,), level), draws)
            if level == 0:
                assert torch.equal(entries["extra"], enlarged(given, 2))
            condition = with_entries(label, entries)
        given = generator.draw(condition, 2, stream=0).clamp(-1, 1)
    assert given is not None
    assert np.array_equal(drawn[:2], images.to_uint8(given))
    # A stage's noise is not that of another one.
    assert len({stage.seed for stage in [*cascade.stages_of(config), config]}) == 3


def test_stages_keep_their_own_process_sampler_and_guidance(trained: list[Path]) -> None:
    config = small_config(trained[2], "sample", **STAGES[2], **before(trained, 2))
    first, second = cascade.stages_of(config)
    assert (first.sampler.type, first.sampler.num_steps, first.guidance_scale) == ("ddpm", 3, 2.0)
    assert (second.sampler.type, second.sampler.num_steps, second.guidance_scale) == ("euler", 2, 1.0)
    assert (first.diffusion.type, second.diffusion.shift) == ("SpeeDiffusion", 2.0)


def test_a_grid_has_a_column_for_each_stage(trained: list[Path]) -> None:
    grid = {"sample_classes": "[3, 5]", "samples_per_class": 2}
    assert run("sample", trained[2], **STAGES[2], **before(trained, 2), **grid) == 0
    with Image.open(trained[2] / "samples.png") as shown:
        pixels = np.asarray(shown)
    # Titles on the left and above, then four rows of three stages, each enlarged to 64 pixels.
    assert pixels.shape[1] == 128 + 3 * 66 + 2
    assert pixels.shape[0] > 4 * 66 + 2
    assert (pixels[0] == 255).all()


def figures_of_test(capsys: pytest.CaptureFixture[str], folder: Path, **options: Any) -> Any:
    """test.json of a test of the stages, after checks of the table that it prints."""
    capsys.readouterr()
    assert run("test", folder, score_stages=True, **options) == 0
    told = capsys.readouterr().out.splitlines()
    header = next(line for line in told if line.startswith("stage "))
    table = told[told.index(header) : told.index(header) + 6]
    assert [line.split()[:3] for line in table[1:]] == [
        ["1", "8", "noise"],
        ["2", "16", "stage"],
        ["2", "16", "data"],
        ["3", "(whole)", "32"],
        ["3", "32", "data"],
    ]
    found = json.loads((folder / "test.json").read_text())
    names = ["stage_1", "stage_2", "stage_2_from_data", "whole", "stage_3_from_data"]
    assert list(found["stages"]) == names
    assert found["figures"] == found["stages"]["whole"]["figures"]
    assert ["psnr" in found["stages"][name]["figures"] for name in names] == [False, False, True, False, True]
    return found


def test_each_stage_is_scored_by_itself(
    trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawing: dict[str, Any] = {"num_samples": 6, "per_proc_batch_size": 4}
    measured = {"evaluation__metrics": "[fid,psnr]"}
    drawn_before = shutil.ignore_patterns("inference")
    runs = [shutil.copytree(folder, tmp_path / folder.name, ignore=drawn_before) for folder in trained]
    whole: dict[str, Any] = {**STAGES[2], **before(runs, 2)}
    missing = error(capsys, "test", runs[2], score_stages=True, **whole, **measured)
    assert "run the phase inference first" in missing
    assert run("inference", runs[2], **whole, **drawing) == 0
    (npz,) = (runs[2] / "inference").glob("*.npz")
    alone = read_npz(npz)
    assert "wanted those of the phase inference with the same cascade and score_stages: true" in error(
        capsys, "test", runs[2], score_stages=True, **whole, **measured
    )
    shutil.move(runs[2] / "inference", tmp_path / "without_stages")

    assert run("inference", runs[2], score_stages=True, **whole, **drawing) == 0
    (npz,) = (runs[2] / "inference").glob("*.npz")
    assert np.array_equal(read_npz(npz), alone)
    sets = npz.with_name(f"{npz.stem}_stages")
    first = load_generator(cascade.stages_of(small_config(runs[2], "inference", **whole))[0])[0]
    rows = [json.loads(line)["label"] for line in (sets / "stage_1" / "labels.jsonl").open()]
    by_hand = first.draw(torch.tensor(rows[:4]), 4, stream=0).clamp(-1, 1)
    assert np.array_equal(pixels_of(sets / "stage_1")[:4], images.to_uint8(by_hand)[..., 0])
    # On the data a stage draws what its own inference draws.
    for number, folder in ((2, runs[1]), (3, runs[2])):
        clean = {**STAGES[number - 1], "sampler__augmentation": 0.0}
        place = {"experiment_dir": tmp_path / f"alone_{number}", "ckpt_path": folder}
        assert run("inference", folder, **{**clean, **drawing, **place}) == 0
        (drawn,) = (tmp_path / f"alone_{number}" / "inference").glob("*.npz")
        assert np.array_equal(pixels_of(sets / f"stage_{number}_from_data"), read_npz(drawn)[..., 0])

    found = figures_of_test(capsys, runs[2], **whole, **measured)
    # The same figures as those of a test with the stage's own config.
    own = {**STAGES[1], "experiment_dir": tmp_path / "own", "samples": sets / "stage_2_from_data"}
    assert run("test", runs[1], **{**own, **measured}) == 0
    figures = json.loads((tmp_path / "own" / "test.json").read_text())["figures"]
    assert found["stages"]["stage_2_from_data"]["figures"] == figures
    # A failure in the last set leaves the figures of those before.
    Image.new("L", (8, 8)).save(sets / "stage_3_from_data" / "000005.png")
    failing = error(capsys, "test", runs[2], score_stages=True, **whole, **measured)
    assert "test compares sets of one shape, got (8, 8, " in failing
    last = found["stages"].pop("stage_3_from_data")
    assert last["figures"]
    assert json.loads((runs[2] / "test.json").read_text()) == found
    other = {**whole, "cascade": f"[{trained[0]},{runs[1]}]"}
    assert "was drawn by other runs" in error(capsys, "test", runs[2], score_stages=True, **other, **measured)


def test_a_list_of_sets_of_another_form_is_refused(tmp_path: Path) -> None:
    for content in (b"{", b"{}", b"[]", b'{"stages": ["stage_1"]}', b'[{"name": "stage_1"}]', b"\xff"):
        (tmp_path / "sets.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"sets\.json: wanted a list of sets, as inference writes it"):
            read_list(tmp_path)


def test_a_failure_on_the_data_leaves_no_part_of_a_set(
    trained: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = shutil.copytree(trained[1], tmp_path / "top")

    def broken(*given: object) -> Any:
        raise ValueError("no data")

    monkeypatch.setattr("speedit_plugins.trainer.sampling.inference.on_data", broken)
    options: dict[str, Any] = {**STAGES[1], **before(trained, 1), "num_samples": 2, "score_stages": True}
    with pytest.raises(ValueError, match="no data"):
        run("inference", top, **options)
    assert list((top / "inference").iterdir()) == []


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    trained: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, small, _ = trained
    grid = {"sample_classes": "[3]"}
    other = shutil.copytree(base, tmp_path / "other")
    told = (other / "config_train.yaml").read_text()
    (other / "config_train.yaml").write_text(told.replace("prediction_type: epsilon", "prediction_type: x0"))
    differs = "was trained with another config: diffusion.prediction_type was 'epsilon', got 'x0'"
    solids = tmp_path / "solids"
    solids.mkdir()
    (solids / "config_train.yaml").write_text(Path("configs/shapes/digits.yaml").read_text())
    cases: tuple[tuple[str, dict[str, Any], str], ...] = (
        (
            f"[{solids}]",
            STAGES[1],
            f"cascade[0] needs a run that draws images or videos, got {solids} that dr",
        ),
        (f"[{base}]", STAGES[2], "cascade[0] draws 8 x 8 pixels, and this run enlarges 16 x 16 to 32 x 32"),
        (f"[{small}]", STAGES[2], "cascade[0] needs a run that draws from noise alone"),
        (f"[{base},{base}]", STAGES[2], "cascade[1] needs a super-resolution run behind cascade[0]"),
        (f"[{other}]", STAGES[1], f"{other}/checkpoints/step_0000002 {differs}"),
        (f"[{tmp_path}]", STAGES[1], f"cascade[0] needs the folder of a trained run, got {tmp_path}"),
        (f"[{base}]", STAGES[0], "cascade: has no effect without super_resolution.factor"),
        (f"[{base}]", {**STAGES[1], "low_resolution": "x.npz"}, "low_resolution: the stages of cascade draw"),
        (
            f"[{base}]",
            {**STAGES[1], "num_classes": 0, "sample_classes": "[]"},
            "cascade[0] has num_classes 10, and this run 0",
        ),
    )
    for named, changes, said in cases:
        found = error(capsys, "sample", trained[1], cascade=named, **{**grid, **changes})
        assert said in found
        assert len(found.strip().splitlines()) == 1
    assert not (trained[1] / "samples.png").exists()
    keys: tuple[tuple[str, dict[str, Any], str], ...] = (
        ("train", {"cascade": f"[{base}]"}, "cascade: has no effect in train"),
        ("test", {"cascade": f"[{base}]"}, "no effect in test; wanted [], or score_stages true"),
        ("test", {"score_stages": True}, "score_stages: has no effect without cascade"),
        ("sample", {"score_stages": True}, "score_stages: has no effect in sample"),
    )
    for phase, changes, said in keys:
        assert said in error(capsys, phase, small, **STAGES[1], **changes)


def test_a_cascade_of_captions_shares_its_t5(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_text_encoder(tmp_path / "t5", "t5")
    save_tokenizer(tmp_path / "t5")
    base, top = tmp_path / "base", tmp_path / "top"
    given = [
        f"text_encoder={{type: TextEncoder, path: {tmp_path / 't5'}, max_length: 16}}",
        f"model.text_width={TEXT_WIDTH}",
        "sample_prompts=[red heart, green apple]",
    ]
    large = [*train_captioned(tmp_path, given), "num_samples=3"]
    built = []
    build = cascade.load_generator.__globals__["build"]
    text = build.build_text_encoder
    monkeypatch.setattr(build, "build_text_encoder", lambda *given: built.append(given) or text(*given))
    assert main(["-p", "sample", *large, "samples_per_class=1"]) == 0
    assert (top / "samples.png").is_file()
    assert main(["-p", "inference", *large, "score_stages=true"]) == 0
    assert len(built) == 2  # once in each phase
    (sets,) = (top / "inference").glob("*_stages")
    lines = [json.loads(line) for line in (sets / "stage_1" / "captions.jsonl").open()]
    assert [line["caption"] for line in lines] == ["red heart", "green apple", "red heart"]
    given = [json.loads(line) for line in (sets / "stage_2_from_data" / "captions.jsonl").open()]
    # The first, the middle and the last third of the emoji begin with these.
    assert [line["caption"] for line in given] == [Emoji().captions[row] for row in (0, 637, 1274)]

    told = base / "config_train.yaml"
    told.write_text(told.read_text().replace("max_length: 16", "max_length: 17"))
    capsys.readouterr()
    assert main(["-p", "sample", *large]) == 2
    assert "cascade[0] has text_encoder {" in capsys.readouterr().err
