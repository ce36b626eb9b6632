import base64
import importlib
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments, small_config, small_trainer
from shapes_of_tests import POINTS, shape_config

from speedit_plugins.cli import main
from speedit_plugins.trainer.data.videos.files import write_gif
from speedit_plugins.trainer.logging.shapes import save_shapes
from speedit_plugins.trainer.results import save_config
from speedit_plugins.trainer.training.assembly import build_trainer

report: ModuleType = importlib.import_module("report")
page: ModuleType = importlib.import_module("run_report.page")
plots: ModuleType = importlib.import_module("run_report.plots")

METRIC = {"value": 12.34567, "features": "digit_classifier", "num_samples": 300, "num_reference": None}
VOID = {"meta", "img", "path", "rect", "circle", "image"}


class Checked(HTMLParser):
    """Collects headings, text and addresses of a document, and checks that its tags nest."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(document)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def written(folder: Path) -> Checked:
    assert report.main([str(folder)]) == 0
    return Checked((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    options = arguments(folder, profile_every=10, sample_every=10, experiment_name="a <b>bold</b> & new run")
    assert main(["-c", "configs/image/digits/speedit.yaml", "-p", "train", *options]) == 0
    return folder


def test_a_report_is_one_file_without_scripts_or_outside_addresses(trained: Path) -> None:
    found = written(trained)
    assert found.headings == [
        "Summary",
        "Curves",
        "Loss and gradient by timestep",
        "Samples over time",
        "Timestep policy",
        "Evaluation",
        "Config",
        "Environment",
    ]
    assert found.addresses
    assert all(address.startswith("data:image/") for address in found.addresses)
    assert not found.tags & {"script", "link", "iframe", "object"}
    style = (Path(page.__file__).with_name("page.css")).read_text()
    assert "url(" not in style
    assert "@import" not in style
    # The run's name must appear as text, not as markup.
    assert "a <b>bold</b> & new run" in found.text
    assert "b" not in found.tags


def test_a_report_says_what_the_run_is_and_what_it_lacks(trained: Path) -> None:
    text = written(trained).text
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "20 of 20" in text
    assert "speedit: boundary 642 of 1000 timesteps, mean weight 0.5815" in text
    assert f"{rows[-1]['loss']:.4g}" in text
    # The areas have 8.6, 84.2 and 7.2 % of the importance, as published.
    assert "219 .. 69962.1 %84.2 %" in text
    assert "profile_every: 10" in text
    assert json.loads((trained / "environment.json").read_text())["torch"] in text
    for missing in (
        "No samples.png: the phase sample was not run.",
        "No test.json: the phase test was not run.",
        "No timestep_profile.json: tools/timestep_profile.py writes it.",
    ):
        assert missing in text


def test_a_report_shows_what_was_validated_and_evaluated(tmp_path: Path) -> None:
    options = arguments(
        tmp_path,
        validate_every=10,
        data__held_out_samples=20,
        evaluate_every=10,
        evaluate_samples=10,
        features="pixels@8",
        guidance_scale=1.0,
    )
    assert main(["-c", "configs/image/digits/speedit.yaml", "-p", "train", *options]) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    text = written(tmp_path).text
    assert "validation, mse of the averaged weights" in text
    assert "Validation: mse, same samples at every timestep" in text
    assert "fid[pixels@8], 10 samples in training" in text
    # The last line is one of an evaluation; the facts come from the newest line that has them.
    assert "loss" not in rows[-1]
    (last,) = (row for row in rows if row["step"] == 20 and "loss" in row)
    (validated,) = (row for row in rows if row["step"] == 20 and "val_loss" in row)
    assert f"last loss{last['loss']:.4g}" in text
    assert f"last validation loss{validated['val_loss']:.4g}" in text


def test_the_parameters_are_those_that_training_announced(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config(trained)
    model = build_trainer(config).model
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{count:,} trained parameters" in written(trained).text


def test_the_parameters_are_counted_whatever_the_optimizer_keeps_of_them(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path, optimizer__type="Muon")
    trainer.optimizer_step()
    count = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert report._num_trained(trainer.save()) == count


def test_what_later_phases_leave_is_shown(trained: Path) -> None:
    content = {"figures": {"fid[digit_classifier]": METRIC}, "samples": "drawn.npz", "reference": None}
    (trained / "test.json").write_text(json.dumps(content))
    values = [0.5 + number for number in range(20)]
    ranges = [[50 * number, 50 * number + 50] for number in range(20)]
    profile = {
        "step": 20,
        "weights": "ema",
        "ranges": ranges,
        "loss": values,
        "mse": values,
        "grad_norm": values,
    }
    (trained / "timestep_profile.json").write_text(json.dumps(profile))
    try:
        text = written(trained).text
    finally:
        (trained / "test.json").unlink()
        (trained / "timestep_profile.json").unlink()
    assert "fid[digit_classifier]12.35digit_classifier300-" in text
    assert "drawn.npz" in text
    assert "Gradient norm, measured: ema weights, step 20" in text


def test_what_is_older_than_the_newest_checkpoint_says_so(trained: Path) -> None:
    image, drawn, metrics = (trained / name for name in ("samples.png", "drawn.npz", "test.json"))
    Image.new("L", (4, 4)).save(image)
    drawn.write_text("")
    metrics.write_text(json.dumps({"figures": {"fid": METRIC}, "samples": str(drawn), "reference": None}))
    note = ", older than the checkpoint step_0000020"
    try:
        assert note not in written(trained).text
        # test.json may be new although the samples are old: test measures the existing samples.
        for path in (image, drawn):
            os.utime(path, (0, 0))
        text = written(trained).text
    finally:
        for path in (image, drawn, metrics):
            path.unlink()
    assert f"samples.png, written by the phase sample{note}" in text
    assert f"(300 samples{note})" in text
    assert f"drawn.npz{note}" in text


def test_a_damaged_file_is_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = trained / "test.json"
    try:
        for content, message in (("{", "Expecting property name"), ("[1]", "wanted an object, got list")):
            metrics.write_text(content)
            assert report.main([str(trained)]) == 2
            assert f"report: error: {metrics} is damaged: {message}" in capsys.readouterr().err
    finally:
        metrics.unlink()


def test_a_run_without_a_logged_line_or_grid_is_reported(tmp_path: Path) -> None:
    save_config(small_config(tmp_path), "train")
    text = written(tmp_path).text
    assert "nothing logged yet" in text
    assert "metrics.jsonl has no line yet." in text
    assert "parameters unknown without a checkpoint" in text
    assert "No sample grids were written during training" in text
    assert "No environment.json" in text


def test_a_line_of_an_older_version_has_fewer_curves(tmp_path: Path) -> None:
    save_config(small_config(tmp_path), "train")
    (tmp_path / "metrics.jsonl").write_text('{"step": 5, "loss": 1.5, "grad_norm": null}\n')
    found = written(tmp_path)
    assert "This run logged no loss per timestep." in found.text
    assert "Losses" in found.text
    assert "Gradient norm" not in found.text


def test_a_report_of_accelerations_says_which_and_shows_negative_losses(tmp_path: Path) -> None:
    flow = "{type: RectifiedFlow, policy: uniform}"
    changes = {"diffusion": flow, "contrastive__weight": 0.05, "alignment": "{type: SRA, layer: 1}"}
    save_config(small_config(tmp_path, **changes), "train")
    rows = []
    for step in (5, 10):
        ranges = [None, -0.3, 0.0, *[0.5] * 17]
        lists = {"loss_per_timestep": ranges, "loss_std_per_timestep": [v and 0.1 for v in ranges]}
        rows.append({"step": step, "loss": 0.01 - 0.001 * step, "alignment": 0.75, **lists})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = written(tmp_path)
    assert "accelerationsalignment SRA 0.5 at block 1, contrastive 0.05" in found.text
    assert "last alignment0.75" in found.text
    for title in (
        "loss (weight × mse + vb + accelerations)",
        "Alignment: mean cosine similarity",
        "Loss at the drawn timesteps",
        "Loss up to step 10: mean ± standard deviation of a sample",
    ):
        assert title in found.text
    assert "nan" not in (tmp_path / "report.html").read_text()


def test_a_report_of_a_stage_says_what_it_enlarges(tmp_path: Path) -> None:
    stage = {"super_resolution": "{factor: 2, augmentation: 0.3}", "image_size": 32}
    save_config(small_config(tmp_path, **stage), "train")
    Image.new("L", (4, 4)).save(tmp_path / "samples.png")
    text = written(tmp_path).text
    assert "super-resolution16 x 16 to 32 x 32 pixels, noise on the input up to 0.3" in text
    assert " behind " not in text
    drawn = small_config(tmp_path, "sample", **stage, cascade="[runs/first, runs/second]")
    save_config(drawn, "sample")
    assert "written by the phase sample behind runs/first, runs/second" in written(tmp_path).text


def test_a_report_of_a_cascade_shows_the_scores_of_its_stages(tmp_path: Path) -> None:
    save_config(small_config(tmp_path), "train")

    def stage(number: int, inputs: str, **values: float) -> dict[str, Any]:
        figures = {name: {**METRIC, "value": value} for name, value in values.items()}
        about = {"number": number, "image_size": 8 * number, "inputs": inputs, "run": "r", "weights": "w"}
        return {**about, "figures": figures, "samples": "s", "reference": None}

    def shown(**content: Any) -> str:
        content = {"samples": "drawn.npz", "reference": None, **content}
        (tmp_path / "test.json").write_text(json.dumps(content))
        return written(tmp_path).text

    # As after a failure: the whole was not reached.
    first = {"stage_1": stage(1, "noise", fid=2.5)}
    text = shown(figures={}, stages=first)
    assert "test.json has no figures of the samples: the phase test ended before it measured them" in text
    assert "set of a stagestagepixelsinputfidstage_118noise2.5samplesdrawn.npz" in text
    behind, on_data = stage(2, "stage", fid=3.0), stage(2, "data", fid=1.5, psnr=30.0)
    stages = {**first, "whole": behind, "stage_2_from_data": on_data}
    text = shown(figures=behind["figures"], stages=stages)
    assert "fid3digit_classifier300-" in text
    assert "inputfidpsnrstage_118noise2.5-whole216stage 13-stage_2_from_data216data1.530" in text
    # Without stages, and as before there were figures.
    assert "no figures of the samples" in shown(figures={})
    assert "set of a stage" not in shown(figures={})
    assert "was written by an older version" in shown(fid=2.0)


@pytest.mark.parametrize("form", [(), POINTS], ids=["voxels", "points"])
def test_a_report_of_shapes_shows_their_sides_and_turns_the_last_ones(
    tmp_path: Path, form: tuple[str, ...]
) -> None:
    config = shape_config(tmp_path, *form)
    folder = Path(config.experiment_dir)
    save_config(config, "train")
    shapes = torch.randn(1, 3, 40) if form else torch.ones(1, 1, 8, 8, 8)
    (folder / "grids").mkdir()
    for name in ("grids/step_0000005.png", "samples.png"):
        save_shapes(shapes, folder / name, columns=1, titles=["flat"])
    figures = {"mmd[chamfer]": {**METRIC, "value": 0.25, "features": "40 points"}}
    content = {"figures": figures, "samples": "drawn", "reference": "data.validation"}
    (folder / "test.json").write_text(json.dumps(content))
    found = written(folder)
    size = "shapes40 points in 8 x 8 x 8 voxels" if form else "shapessolids of 8 x 8 x 8 voxels"
    assert size in found.text
    assert "mmd[chamfer]0.2540 points300-" in found.text
    # The training's grids stand still, so that they can be compared.
    kinds = [address.split(";")[0] for address in found.addresses]
    assert kinds == ["data:image/png", "data:image/png", "data:image/gif"]
    assert "The same, turning" in found.text


def test_of_many_grids_some_are_chosen_evenly_with_both_ends(tmp_path: Path) -> None:
    save_config(small_config(tmp_path), "train")
    (tmp_path / "grids").mkdir()
    for step in range(1, 34):
        Image.new("L", (4, 4)).save(tmp_path / "grids" / f"step_{step:07d}.png")
    text = written(tmp_path).text
    assert "12 of 33 grids, evenly selected." in text
    found = [int(step) for step in re.findall(r"step (\d+)", text)]
    assert (found[0], found[-1], len(found)) == (1, 33, 12)


def test_a_folder_that_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"report: error: {tmp_path} is not a run: wanted the experiment_dir of a training run" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_file_may_lie_elsewhere(
    tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(trained), "--out", str(tmp_path / "new.html")]) == 0
    assert str(tmp_path / "new.html") in capsys.readouterr().out
    assert report.main([str(trained), "--out", str(tmp_path / "none" / "new.html")]) == 2
    assert "--out needs a file in a folder that exists" in capsys.readouterr().err


def image_of(html: str) -> Image.Image:
    (found,) = re.findall(r'(?:src|href)="data:image/\w+;base64,([^"]+)"', html)
    return Image.open(io.BytesIO(base64.b64decode(found)))


def test_a_moving_grid_is_embedded_as_it_is_and_a_wide_still_one_reduced(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    Image.new("RGB", (2 * page.MAX_WIDTH, 100)).save(path)
    assert image_of(page.image("wide", path)).size == (page.MAX_WIDTH, 50)
    frames = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    frames[1:] += np.array([100, 200], dtype=np.uint8).reshape(2, 1, 1, 1)
    write_gif(path.with_suffix(".gif"), torch.from_numpy(frames), fps=10)
    moving: Any = image_of(page.image("moving", path))
    assert (moving.format, moving.n_frames) == ("GIF", 3)
