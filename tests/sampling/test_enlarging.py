"""Samples of super-resolution models: of the data, of files, in grids, in inference and in a training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, small_config, small_trainer

from speedit_plugins.cli import main
from speedit_plugins.trainer.build import build_process
from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.evaluation.metrics import Figures, MetricValue
from speedit_plugins.trainer.evaluation.npz import read_npz
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.low_resolution import enlarged, reduced
from speedit_plugins.trainer.sampling import evaluate
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.scores.stage_scores import StageScores
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import FromData, given_conditions
from speedit_plugins.trainer.sampling.super_resolution.stage_sets import StageSet

DIGITS, MOVING = "configs/image/digits/speedit.yaml", "configs/text_to_video/moving_digits.yaml"
SUPER = {"super_resolution__factor": 2, "max_training_steps": 2, "sample_classes": "[]"}
CPU = torch.device("cpu")


def run(phase: str, folder: Path, **changes: Any) -> int:
    return main(["-c", DIGITS, "-p", phase, *arguments(folder, **{**SUPER, **changes})])


def error(capsys: pytest.CaptureFixture[str], phase: str, folder: Path, **changes: Any) -> str:
    capsys.readouterr()
    assert run(phase, folder, **changes) == 2
    return capsys.readouterr().err


def generator_of(folder: Path, **changes: Any) -> SampleGenerator:
    """A generator with an untrained model. Its last layer is not zero: samples depend on their input."""
    config = small_config(folder, "sample", **{**SUPER, **changes})
    trainer = small_trainer(folder, **{**SUPER, **changes})
    seeded = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(trainer.model.final_layer.linear.weight, std=0.1, generator=seeded)
    process = build_process(config, respaced=False)
    return SampleGenerator(trainer.model, process, trainer.inputs.encoder, config)


def test_the_data_are_reduced_and_keep_their_classes(tmp_path: Path) -> None:
    config = small_config(tmp_path, "sample", **SUPER)
    data = FromData(config, num_samples=3)
    assert data.items.tolist() == [0, 599, 1198]
    digits = [Digits(image_size=8).load(index, torch.Generator()) for index in data.items.tolist()]
    whole = torch.stack([item["image"] for item in digits])
    rows = torch.tensor([2, 0])
    assert torch.equal(data.at(rows), reduced(whole[rows], 2))
    conditions = given_conditions(config, generator_of(tmp_path), None, num_samples=3)
    condition = conditions.of(rows, CPU)
    assert isinstance(condition, dict)
    assert condition["label"].tolist() == [digits[2]["label"], digits[0]["label"]]
    # No noise by default, whatever the training had.
    assert condition["level"].tolist() == [0, 0]
    assert torch.equal(condition["extra"], enlarged(reduced(whole[rows], 2), 2))
    # More than there are are taken in turn.
    assert len(FromData(config, num_samples=5000)) == 1797


def test_held_out_samples_are_taken_first(tmp_path: Path) -> None:
    held = {"data__held_out_samples": 5, "validate_every": 2}
    trained = small_trainer(tmp_path, **SUPER, **held).loader.dataset
    data = FromData(small_config(tmp_path, "sample", **SUPER, **held), num_samples=50)
    assert len(data) == 5
    own = set(trained.indices.tolist())
    assert not own & set(data.dataset.indices.tolist())


def test_the_noise_at_sampling_depends_on_seed_and_row_alone(tmp_path: Path) -> None:
    options = {"sampler__augmentation": 0.1}
    generator = generator_of(tmp_path, **options)
    conditions = given_conditions(generator.config, generator, None, num_samples=4)
    whole = conditions.of(torch.arange(4), CPU)
    part = conditions.of(torch.tensor([2]), CPU)
    assert isinstance(whole, dict)
    assert isinstance(part, dict)
    assert torch.equal(whole["extra"][2:3], part["extra"])
    assert whole["level"].tolist() == pytest.approx([0.1] * 4)
    clean = given_conditions(small_config(tmp_path, "sample", **SUPER), generator, None, num_samples=4)
    assert not torch.equal(whole["extra"], clean.of(torch.arange(4), CPU)["extra"])  # type: ignore[index, call-overload]  # a mapping


def test_guidance_keeps_the_low_resolution_input_on_both_branches(tmp_path: Path) -> None:
    generator = generator_of(tmp_path, guidance_scale=2.0, sampler__augmentation=0.1)
    conditions = given_conditions(generator.config, generator, None, num_samples=3)
    seen: list[dict[str, torch.Tensor]] = []
    generator.model.register_forward_pre_hook(lambda module, given: seen.append(given[2]))
    generator.draw(conditions.of(torch.arange(3), CPU), 3)
    assert seen
    for condition in seen:
        for name in ("extra", "level"):
            given, null = condition[name].chunk(2)
            assert torch.equal(given, null)
        assert condition["label"][3:].tolist() == [10, 10, 10]


def test_a_run_is_trained_measured_sampled_and_tested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {
        "sample_every": 2,
        "evaluate_every": 2,
        "evaluate_samples": 20,
        "profile_every": 2,
        "validate_every": 2,
        "data__held_out_samples": 20,
        "evaluation__metrics": "[fid]",
    }
    assert run("train", tmp_path, samples_per_class=3, **measured) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert {"val_loss", "evaluation_samples", "profile_mse"} <= {key for row in rows for key in row}
    # A row per sample: low resolution, sample and original, below their titles.
    width = 3 * 66 + 2
    with Image.open(tmp_path / "grids" / "step_0000002.png") as grid:
        pixels = np.asarray(grid.convert("RGB"))
    assert pixels.shape[1] == 128 + width
    assert pixels[-(3 * 66 + 2) :].shape[0] == 3 * 66 + 2
    assert run("sample", tmp_path, samples_per_class=2) == 0
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size[0] == 128 + width

    assert run("inference", tmp_path, num_samples=5, per_proc_batch_size=2) == 0
    (npz,) = (tmp_path / "inference").glob("*.npz")
    labels = [json.loads(line) for line in (npz.with_suffix("") / "labels.jsonl").read_text().splitlines()]
    data = FromData(small_config(tmp_path, "inference", **SUPER), num_samples=5)
    assert [row["label"] for row in labels] == [data.item(row)["label"] for row in range(5)]
    assert run("test", tmp_path, evaluation__metrics="[fid,psnr]") == 0
    figures = json.loads((tmp_path / "test.json").read_text())["figures"]
    assert set(figures) == {"fid[digit_classifier]", "psnr"}
    originals = images.to_uint8(data.originals(torch.arange(5)))
    errors = ((read_npz(npz).astype(float) - originals) ** 2).mean(axis=(1, 2, 3))
    assert figures["psnr"]["value"] == pytest.approx(np.mean(10 * np.log10(255**2 / errors)))
    said = error(capsys, "test", tmp_path, evaluation__metrics="[psnr,ssim]", features="nowhere")
    assert "ssim needs images of 11 x 11 pixels or more, got 8 x 8" in said
    # The folder has the same samples. Other held-out samples are other originals.
    pairs = {"evaluation__metrics": "[psnr]", "samples": npz.with_suffix("")}
    assert run("test", tmp_path, **pairs) == 0
    said = error(capsys, "test", tmp_path, **pairs, data__held_out_samples=1500)
    assert "the data have another sample in place of that of 000000.png" in said
    assert "hole_error compares" in error(capsys, "test", tmp_path, evaluation__metrics="[hole_error]")
    # More samples than inputs; the same input gives another sample, from other noise.
    few = {"num_samples": 5, "data__held_out_samples": 3}
    capsys.readouterr()
    assert run("inference", tmp_path, **few, seed=1) == 0
    told = capsys.readouterr().out
    assert "5 samples of 3 low-resolution inputs: inputs are used more than once" in told
    said = error(capsys, "test", tmp_path, evaluation__metrics="[psnr]", samples=tmp_path / "inference")
    assert f"samples needs one set of samples, got {tmp_path}/inference with {npz.stem}, step" in said
    (npz.with_suffix("") / "items.jsonl").unlink()
    # Before the features, since they take long.
    given = {**pairs, "evaluation__metrics": "[fid,psnr]", "reference": "nowhere.npz"}
    assert "metrics of pairs need what" in error(capsys, "test", tmp_path, **given)


def test_ssim_of_a_stage_that_is_too_small_is_refused_before_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = (str(tmp_path), "weights")
    sets = [
        (StageSet("stage_2_from_data", 2, 8, "data", *about), tmp_path),
        (StageSet("whole", 3, 16, "stage", *about), tmp_path),
    ]
    monkeypatch.setattr(evaluate, "written_stages", lambda *given: sets)
    monkeypatch.setattr(evaluate, "measure_stages", lambda *given: pytest.fail("measured"))
    options = {"image_size": 16, "cascade": "[small, middle]", "score_stages": True, "samples": tmp_path}
    said = error(capsys, "test", tmp_path, evaluation__metrics="[psnr,ssim]", **options)
    assert "ssim needs images of 11 x 11 pixels or more, got 8 x 8" in said


def test_figures_are_written_after_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = StageSet("stage_1", 1, 8, "noise", str(tmp_path), "weights")
    whole = StageSet("whole", 2, 16, "stage", str(tmp_path), "weights")
    written: list[dict[str, Any]] = []

    def measured(*given: object) -> Iterator[StageScores]:
        for value, about in enumerate((first, whole)):
            yield StageScores(about, Figures([MetricValue("fid", value, "pixels", 2)], about.name))
            written.append(json.loads((tmp_path / "test.json").read_text()))
        raise ValueError("the last set has no data")

    monkeypatch.setattr(evaluate, "written_stages", lambda *given: [])
    monkeypatch.setattr(evaluate, "measure_stages", measured)
    options = {"image_size": 16, "cascade": "[small]", "score_stages": True, "samples": tmp_path / "drawn"}
    with pytest.raises(ValueError, match="the last set has no data"):
        run("test", tmp_path, **options)
    # Before the whole there are no figures of the test.
    assert [row["figures"].get("fid", {}).get("value") for row in written] == [None, 1]
    assert [Path(row["samples"]).name for row in written] == ["drawn", "whole"]
    assert [list(row["stages"]) for row in written] == [["stage_1"], ["stage_1", "whole"]]
    assert json.loads((tmp_path / "test.json").read_text()) == written[-1]
    assert written[-1]["figures"] == written[-1]["stages"]["whole"]["figures"]


def test_files_of_another_run_are_enlarged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, top = tmp_path / "base", tmp_path / "top"
    plain, large = {"super_resolution__factor": 0}, {"image_size": 16}
    assert run("train", base, **plain) == 0
    assert run("inference", base, num_samples=3, **plain) == 0
    (npz,) = (base / "inference").glob("*.npz")
    assert run("train", top, **large) == 0
    for source in (npz, npz.with_suffix("")):
        assert (
            run("inference", top, num_samples=4, per_proc_batch_size=2, low_resolution=source, **large) == 0
        )
    # From both, the same samples under other names: the fourth enlarges the first again.
    one, other = (read_npz(path) for path in sorted((top / "inference").glob("*.npz")))
    assert np.array_equal(one, other)
    stored = read_npz(npz)
    config = small_config(top, "inference", **SUPER, **large, low_resolution=npz)
    conditions = given_conditions(config, generator_of(tmp_path / "x", **large), None, num_samples=4)
    rows = torch.arange(3)
    assert np.array_equal(images.to_uint8(conditions.inputs.samples.at(rows)), stored)  # type: ignore[union-attr]  # with inputs
    labels = [json.loads(line)["label"] for line in (npz.with_suffix("") / "labels.jsonl").open()]
    assert conditions.of(rows, CPU)["label"].tolist() == labels  # type: ignore[index, call-overload, union-attr]  # a mapping
    assert run("sample", top, samples_per_class=2, low_resolution=npz, **large) == 0
    with Image.open(top / "samples.png") as grid:
        assert grid.size[0] == 128 + 2 * 66 + 2

    said = error(capsys, "inference", top, low_resolution=next((top / "inference").glob("*.npz")), **large)
    assert "low_resolution needs samples of 8 x 8 x 1, since image_size is 16" in said
    (npz.with_suffix("") / "labels.jsonl").unlink()
    assert "low_resolution needs the classes of" in error(
        capsys, "inference", top, low_resolution=npz, **large
    )
    assert "which is not there" in error(capsys, "sample", top, low_resolution="nowhere.npz", **large)


def test_keys_without_effect_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = {"super_resolution__factor": 0, "sample_classes": "[1]"}
    for changes, said in (
        ({**plain, "low_resolution": "x.npz"}, "low_resolution: has no effect without"),
        ({**plain, "sampler__augmentation": 0.1}, "sampler.augmentation: has no effect without"),
        ({"sampler__augmentation": 0.3}, "wanted at most super_resolution.augmentation 0.2"),
    ):
        assert said in error(capsys, "sample", tmp_path, **changes)
    assert "has no effect in train" in error(capsys, "train", tmp_path, low_resolution="x.npz")


def test_videos_with_captions_are_enlarged(tmp_path: Path) -> None:
    options = [
        f"experiment_dir={tmp_path}",
        *("super_resolution.factor=2", "model.hidden_size=24", "model.depth=2", "model.text_hidden=16"),
        *("max_training_steps=101", "data.batch_size=2", "optimizer.grad_accumulation=1", "log_every=50"),
        *("enable_tensorboard_log=false", "ckpt_every=200", "sampler.num_steps=2", "samples_per_class=2"),
    ]
    assert main(["-c", MOVING, "-p", "train", *options]) == 0
    assert main(["-c", MOVING, "-p", "sample", *options]) == 0
    # A row for each of three versions of two clips, with their four frames.
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size == (128 + 4 * 66 + 2, 6 * 66 + 2)
    # The caption of each clip is beside its row.
    with Image.open(tmp_path / "samples.gif") as gif:
        assert gif.size[0] == 128 + 3 * 66 + 2
