"""Names of classes go from the data to the checkpoint, and from there into grids and files."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import arguments, last_step

from speedit_plugins.cli import main
from speedit_plugins.trainer import checkpoints

CONFIG = ["-c", "configs/image/digits/speedit.yaml"]


def test_a_grid_and_its_files_have_the_names_of_a_folders_classes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    for name in ("cat", "dog"):
        (data / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(data / name / f"{number}.png")
    options = {
        "num_classes": 2,
        "encoder__channels": 3,
        "model__in_channels": 3,
        "sample_classes": "[dog, 0]",
    }
    dataset = f"{{type: ImageFolder, root: {data}}}"
    changes = arguments(run, data__dataset=dataset, max_training_steps=1, sample_every=1, **options)
    assert main([*CONFIG, "-p", "train", *changes]) == 0
    assert last_step(run) == 1
    saved = run / "checkpoints" / "step_0000001"
    assert (
        checkpoints.class_names(saved) == checkpoints.class_names(saved / "ema.safetensors") == ("cat", "dog")
    )
    assert checkpoints.damage(saved) is None
    # The data are not needed any more.
    shutil.rmtree(data)
    assert main([*CONFIG, "-p", "sample", *arguments(run, **options, samples_per_class=2)]) == 0
    grid = np.asarray(Image.open(run / "samples.png"))
    # Two rows of cells, below a band with the names.
    assert grid.shape[0] > 2 * 66 + 2
    assert grid.shape[1:] == (2 * 66 + 2, 3)
    drawn = np.asarray(Image.open(run / "grids" / "step_0000001.png"))
    # Six rows, below the same band.
    assert drawn.shape[0] - 4 * 66 == grid.shape[0]
    options["sample_classes"] = "[dgo]"
    assert main([*CONFIG, "-p", "sample", *arguments(run, **options)]) == 2
    assert "unknown class 'dgo'; did you mean 'dog'?; known: cat, dog" in capfd.readouterr().err
    options["sample_classes"] = "[0]"
    assert main([*CONFIG, "-p", "inference", *arguments(run, **options, num_samples=3)]) == 0
    (lines,) = run.glob("inference/*/labels.jsonl")
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["000000.png", "000001.png", "000002.png"]
    assert all(row["class"] == ("cat", "dog")[row["label"]] for row in rows)
