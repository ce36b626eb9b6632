"""What sample and inference write of shapes, and in which units."""

import json
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from runs import file_size_limit
from shapes_of_tests import POINTS, SmallShapes, config_file, shape_config
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.cli import main
from speedit_plugins.trainer import build, checkpoints
from speedit_plugins.trainer.data.held_out import hold_out
from speedit_plugins.trainer.data.loader import DATA_STREAM, stream_seed
from speedit_plugins.trainer.data.shapes.folder import ShapeFolder
from speedit_plugins.trainer.data.shapes.normalization import Normalization
from speedit_plugins.trainer.evaluation.shape_classifier import ShapeClassifier
from speedit_plugins.trainer.logging.images import save_with_hole
from speedit_plugins.trainer.sampling.files.sample_files import save_cells
from speedit_plugins.trainer.sampling.files.shape_files import (
    read_normalization,
    read_shapes,
    save_models,
    save_shape,
)
from speedit_plugins.trainer.sampling.generator import load_generator
from speedit_plugins.trainer.sampling.scores import shape_scores

CHAMFER = "evaluation.metrics=[chamfer]"
FORMS = {"voxels": (), "points": POINTS}


def run(folder: Path, phase: str, *options: str) -> int:
    return main(["-c", str(config_file(folder)), "-p", phase, f"experiment_dir={folder / 'run'}", *options])


def drawn(folder: Path, *options: str, normalized: bool = False) -> Tensor:
    """What inference draws for the classes in its labels.jsonl."""
    config = shape_config(folder, *options, phase="inference")
    generator, _, _ = load_generator(config)
    if normalized:
        generator.normalization = None
    (lines,) = (folder / "run" / "inference").glob("*/labels.jsonl")
    labels = [json.loads(line)["label"] for line in lines.read_text().splitlines()]
    return generator.draw(torch.tensor(labels), len(labels))


@pytest.mark.parametrize("form", FORMS)
def test_a_run_on_shapes_writes_grids_models_and_sets(
    tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options, folder = FORMS[form], tmp_path / "run"
    assert run(tmp_path, "train", *options, "sample_every=10") == 0
    grids = [folder / "grids" / f"step_0000010.{suffix}" for suffix in ("png", "gif")]
    assert all(path.stat().st_size for path in grids)
    assert run(tmp_path, "sample", *options) == 0
    assert {path.name for path in folder.glob("samples.*")} == {"samples.png", "samples.gif"}
    # Meshes need scikit-image.
    models = [path.name for path in folder.glob("samples/*")]
    assert form == "voxels" or models == ["000000.ply", "000001.ply"]
    assert run(tmp_path, "inference", *options, "num_samples=3") == 0
    assert "drew 3 shapes" in capfd.readouterr().out
    (made,) = (path for path in (folder / "inference").iterdir() if path.is_dir())
    names = [f"{number:06d}.npy" for number in range(3)]
    assert sorted(path.name for path in made.iterdir()) == [*names, "labels.jsonl"]
    lines = (made / "labels.jsonl").read_text().splitlines()
    assert [json.loads(line)["file_name"] for line in lines] == names
    wanted = drawn(tmp_path, *options)
    found = read_shapes(made)
    assert_close(found, wanted if form == "points" else wanted.clamp(-1, 1))
    if form == "points":
        # The normalization of the data is undone.
        seen = drawn(tmp_path, *options, normalized=True)
        assert_close(wanted, seen * 0.5 + torch.tensor([[10.0], [20.0], [30.0]]))


def test_a_checkpoint_keeps_the_normalization_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert run(tmp_path, "train", *POINTS, "max_training_steps=1") == 0
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    kept = Normalization((10.0, 20.0, 30.0), 0.5)
    assert read_normalization(folder) == read_normalization(folder / checkpoints.EMA) == kept
    assert checkpoints.damage(folder) is None
    file = folder / checkpoints.NORMALIZATION
    file.write_text('{"mean": [1, 2, 3], "std": 0}')
    assert checkpoints.damage(folder) is not None
    with pytest.raises(checkpoints.CheckpointError, match=r"normalization.json is damaged: .*std > 0"):
        read_normalization(folder)
    file.unlink()
    assert read_normalization(folder) is None


def test_shapes_come_back_from_their_folder_as_they_were_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    drawn = {"voxels": torch.rand(2, 1, 8, 8, 8) * 2.4 - 1.2, "points": torch.randn(2, 3, 40) + 5}
    sizes = {"voxels": {"voxel_size": 8}, "points": {"num_points": 40, "fit_box": False}}
    for form, shapes in drawn.items():
        folder = tmp_path / form
        folder.mkdir()
        for number, sample in enumerate(shapes):
            save_shape(sample, folder / f"{number:06d}.npy")
        assert_close(read_shapes(folder), shapes.clamp(-1, 1) if form == "voxels" else shapes)
        data = ShapeFolder(folder, class_cond=False, **sizes[form])
        found = data.load(1, torch.Generator())[form]
        if form == "voxels":
            assert_close(found, shapes[1].clamp(-1, 1))
        else:
            # The data set gives the points of a file in an order of its own.
            own = data.normalization.invert(found)
            assert_close(own.sort(dim=1).values, shapes[1].sort(dim=1).values, atol=1e-4, rtol=0)


def test_a_folder_of_shapes_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no shapes, .npy files, in {tmp_path}"):
        read_shapes(tmp_path)
    save_shape(torch.zeros(3, 40), tmp_path / "000000.npy")
    save_shape(torch.zeros(3, 41), tmp_path / "000001.npy")
    with pytest.raises(ValueError, match=r"000001.npy has an array \(41, 3\), unlike the others"):
        read_shapes(tmp_path)
    (tmp_path / "000001.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"cannot read the shape .*000001.npy"):
        read_shapes(tmp_path)


def test_what_cannot_be_written_leaves_the_earlier_file(tmp_path: Path) -> None:
    pixels, hole = np.zeros((4, 4, 3), dtype=np.uint8), np.eye(4, dtype=bool)
    shape, filled = tmp_path / "000000.npy", tmp_path / "000000.png"
    save_shape(torch.zeros(3, 40), shape)
    save_with_hole(pixels, hole, filled)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    # Both files are larger, so that a disk that is full in the middle of one leaves a part of it.
    assert all(len(content) > 60 for content in before.values())
    said = []
    with file_size_limit(60):
        for write in (
            lambda: save_shape(torch.ones(3, 40), shape),
            lambda: save_with_hole(pixels + 1, ~hole, filled),
        ):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
            said.append(str(caught.value))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert [f"cannot write {path}: " in line for path, line in zip((shape, filled), said, strict=True)] == [
        True
    ] * 2


def test_shapes_without_a_surface_have_no_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = shape_config(tmp_path, *POINTS)
    clouds = torch.randn(3, 3, 40)
    clouds[1, 0, 0] = torch.nan
    assert save_models(clouds, tmp_path / "clouds", config) == 2
    assert sorted(path.name for path in (tmp_path / "clouds").iterdir()) == ["000000.ply", "000002.ply"]
    assert "1 of 3 drawn shapes are not finite: a cross, and no file" in capfd.readouterr().out
    solids = torch.full((2, 1, 8, 8, 8), -1.0)
    assert save_models(solids, tmp_path / "solids", shape_config(tmp_path)) == 0
    assert "2 of 2 drawn solids are empty: a blank picture, and no file" in capfd.readouterr().out
    pytest.importorskip("skimage")
    solids[0, 0, 2:6, 2:6, 2:6] = 1.0
    assert save_models(solids, tmp_path / "solids", shape_config(tmp_path)) == 1
    assert (tmp_path / "solids" / "000000.obj").read_text().startswith("v ")


def test_clouds_of_another_size_than_the_data_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, data = shape_config(tmp_path, *POINTS), Normalization((10.0, 20.0, 30.0), 0.5)
    torch.manual_seed(0)
    clouds = data.invert(torch.randn(4, 3, 40))
    save_cells(clouds, tmp_path / "good.png", config, columns=4, normalization=data)
    assert "warning" not in capfd.readouterr().out
    clouds[1] = data.invert(torch.randn(3, 40) * 100)
    clouds[2] = torch.inf
    save_cells(clouds, tmp_path / "large.png", config, columns=4, normalization=data)
    said = capfd.readouterr().out
    assert "warning: 1 of 4 clouds are mostly outside of their pictures" in said
    # Half of a normal distribution in three dimensions is within 1.54 standard deviations.
    assert 110 < float(re.findall(r"farthest is (\S+) standard", said)[0]) < 200


def test_samples_are_scored_against_shapes_that_were_held_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # "Samples" that are the held-out shapes themselves have distance 0, and cover all of them.
    samples = tmp_path / "samples"
    samples.mkdir()
    config = shape_config(tmp_path, *POINTS, "data.held_out_samples=6", phase="test")
    _, held_out = hold_out(build.build_dataset(config), 6, seed=config.seed)
    for number in range(6):
        seed = stream_seed(config.seed, DATA_STREAM, 0, number)
        points = held_out.load(number, torch.Generator().manual_seed(seed))["points"]
        save_shape(points * 0.5 + torch.tensor([[10.0], [20.0], [30.0]]), samples / f"{number:06d}.npy")
    options = (*POINTS, "data.held_out_samples=6", f"samples={samples}")
    assert run(tmp_path, "test", *options, "evaluation.metrics=[chamfer, earth_mover]") == 0
    found = json.loads((tmp_path / "run" / "test.json").read_text())
    assert found["reference"] == "data.held_out_samples"
    figures = {name: each["value"] for name, each in found["figures"].items()}
    for distance in ("chamfer", "earth_mover"):
        assert abs(figures[f"mmd[{distance}]"]) < 1e-5
        assert figures[f"coverage[{distance}]"] == 1
        # Each nearest other shape is the copy in the other set.
        assert figures[f"one_nn_accuracy[{distance}]"] == 0
    said = capfd.readouterr().out
    assert "40 points; 6 samples, 6 reference" in said
    # 15 pairs within each set, and 36 across. What is measured first is said first.
    assert "earth_mover matches 66 pairs of clouds of 40 points: about 1 seconds" in said
    assert said.index("mmd[chamfer]: ") < said.index("earth_mover matches") < said.index("mmd[earth_mover]: ")
    assert not (tmp_path / "run" / "test_0001.json").exists()
    # What was measured before a metric fails is kept.
    with monkeypatch.context() as patch:
        patch.setattr(shape_scores, "_frechet", Mock(side_effect=ValueError("stopped")))
        with pytest.raises(ValueError, match="stopped"):
            run(tmp_path, "test", *options, "evaluation.metrics=[chamfer, frechet]")
    kept = json.loads((tmp_path / "run" / "test.json").read_text())["figures"]
    assert list(kept) == ["mmd[chamfer]", "coverage[chamfer]", "one_nn_accuracy[chamfer]"]
    assert (tmp_path / "run" / "test_0001.json").exists()
    # A folder as the reference has no units of its own.
    assert run(tmp_path, "test", *POINTS, f"samples={samples}", f"reference={samples}", CHAMFER) == 0
    again = json.loads((tmp_path / "run" / "test.json").read_text())["figures"]
    assert again["coverage[chamfer]"]["value"] == 1
    assert abs(again["mmd[chamfer]"]["value"]) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_the_frechet_distance_sees_classes_that_are_missing(
    tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (*FORMS[form], "data.held_out_samples=16", "evaluation.metrics=[frechet]")
    config = shape_config(tmp_path, *options, phase="test")
    whole = build.build_dataset(config)
    folders = {"mixed": range(24), "flat": range(0, 48, 2)}
    found = {}
    for name, indices in folders.items():
        (tmp_path / name).mkdir()
        for number, index in enumerate(indices):
            shape = whole.load(index, torch.Generator().manual_seed(index))[form]
            if form == "points":
                shape = shape * 0.5 + torch.tensor([[10.0], [20.0], [30.0]])
            save_shape(shape, tmp_path / name / f"{number:06d}.npy")
        assert run(tmp_path, "test", *options, f"samples={tmp_path / name}") == 0
        found[name] = json.loads((tmp_path / "run" / "test.json").read_text())["figures"]["frechet"]["value"]
    assert found["mixed"] < found["flat"]
    said = capfd.readouterr().out
    # The 48 shapes that are not held out.
    shown = r"features a classifier of 48 shapes, right on [\d.]+% of others; 16 samples, 16 reference"
    assert re.search(shown, said)
    assert "the classifier of frechet is right on" in said
    assert "warning: a guess" not in said
    # Labels that say nothing of the shapes.
    monkeypatch.setattr(ShapeClassifier, "classify", lambda self, shapes: torch.full((len(shapes),), 7))
    assert run(tmp_path, "test", *options, f"samples={tmp_path / 'mixed'}") == 0
    said = capfd.readouterr().out
    assert "frechet is right on 0.0%" in said
    assert re.search(r"warning: a guess is right on 5\d\.\d%, so frechet .* its figure says little", said)


def test_an_empty_solid_counts_and_a_smaller_set_decides(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = SmallShapes(voxel_size=8)
    folders = {name: tmp_path / name for name in ("samples", "reference")}
    for folder, start, number in ((folders["samples"], 0, 5), (folders["reference"], 8, 4)):
        folder.mkdir()
        for i in range(number):
            save_shape(data.load(start + i, torch.Generator())["voxels"], folder / f"{i:06d}.npy")
    save_shape(torch.full((1, 8, 8, 8), -1.0), folders["samples"] / "000000.npy")
    options = [f"{name}={folder}" for name, folder in folders.items()]
    # Chamfer's is the default of shapes.
    assert run(tmp_path, "test", *options) == 0
    said = capfd.readouterr().out
    assert "evaluation.metrics is not set; shapes are measured by chamfer" in said
    assert "mmd[chamfer]: " in said
    assert "comparing 4 of 5 samples and 4 of 4 reference shapes" in said
    assert "1 of 4 samples are empty solids" in said
    assert "1024 points; 4 samples, 4 reference" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["evaluation.metrics=[fid]"],
            "unknown metric 'fid' of shapes in evaluation.metrics; known: chamfer, earth_mover, frechet",
        ),
        (
            [CHAMFER, "samples=SOLIDS", "data.held_out_samples=5"],
            "at least 2 of each set, got 1 in samples, .*/solids, and 5 in the reference, data.held_out_",
        ),
        (
            ["voxel_size=16", CHAMFER, "samples=SOLIDS", "data.held_out_samples=5"],
            "solids has 8 x 8 x 8 voxels; wanted voxel_size: 16",
        ),
        (
            [*POINTS, "evaluation.metrics=[earth_mover]", "samples=CLOUDS", "data.held_out_samples=5"],
            "same number of points, at most 2048, got 30 in samples, .*/clouds, and num_points: 40",
        ),
        (
            [CHAMFER, "samples=MESHES"],
            "no shapes, .npy files, in .*/meshes, only .obj; wanted a folder that inf",
        ),
        ([CHAMFER, "evaluation.kid_subsets=3"], "evaluation.kid_subsets has no effect on chamfer"),
        (["evaluation.metrics=[chamfer, chamfer]"], "each metric once, at least one of chamfer, earth_mover"),
        (
            ["num_classes=0", "evaluation.metrics=[frechet]"],
            "frechet learns the classes .* num_classes above 0",
        ),
        ([CHAMFER], "no shapes in .*run the phase inference first, or give samples"),
        ([CHAMFER, "samples=SOLIDS"], "wanted reference, data.validation or data.held_out_samples"),
        ([*POINTS, CHAMFER, "samples=SOLIDS"], r"has shapes \(1, 8, 8, 8\), not points"),
    ],
)
def test_what_test_cannot_measure_is_named(
    tmp_path: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    solids = tmp_path / "solids"
    solids.mkdir()
    save_shape(torch.ones(1, 8, 8, 8), solids / "000000.npy")
    for other in ("clouds", "meshes"):
        (tmp_path / other).mkdir()
    save_shape(torch.randn(3, 30), tmp_path / "clouds" / "000000.npy")
    (tmp_path / "meshes" / "000000.obj").touch()
    # SOLIDS is the path of solids.
    named = (re.sub("[A-Z]{6}$", lambda name: str(tmp_path / name[0].lower()), option) for option in options)
    assert run(tmp_path, "test", *named) == 2
    assert re.search(message, capfd.readouterr().err)
