"""A run whose data changed between its parts, through the command line."""

import os
from pathlib import Path

import pytest
from PIL import Image
from runs import arguments

from speedit_plugins.cli import main
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training import assembly


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(20):
        path = tmp_path / "data" / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
        os.utime(path, (1e9, 1e9))
    return tmp_path / "data"


def test_a_run_goes_on_with_renamed_files_only_when_told_to(
    root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = f"{{type: ImageFolder, root: {root}, image_size: 8, class_cond: false}}"
    options = {"data__dataset": dataset, "num_classes": 0, "encoder.channels": 3}
    run = [
        "-c",
        "configs/image/digits/speedit.yaml",
        "-p",
        "train",
        "data.batch_size=8",
        "model.in_channels=3",
    ]

    def train(**changes: object) -> int:
        return main([*arguments(tmp_path / "run", **options, **changes), *run])

    assert train(max_training_steps=1) == 0
    (root / "07.png").rename(root / "20.png")
    capfd.readouterr()
    assert train(max_training_steps=2) == 2
    wanted = (
        "step_0000001 is of another run: the saved position belongs to other data: the names differ (13 of"
        " 20, the first is sample 7, 08.png). data.accept_changed: true goes on with the data as they are"
    )
    assert wanted in capfd.readouterr().err
    assert train(max_training_steps=2, data__accept_changed="true") == 0
    assert "sample 7, 08.png): going on with epoch 1" in capfd.readouterr().out
    # What has been said once is not said again, and the key may stay.
    Image.new("RGB", (9, 9)).save(root / "03.png")
    assert train(max_training_steps=3, data__accept_changed="true") == 0
    said = capfd.readouterr().out
    assert "the names differ" not in said
    assert "files have other sizes (1 of 20, the first is sample 3, 03.png)" in said


def test_ranks_with_other_data_are_refused(root: Path, tmp_path: Path) -> None:
    class Pair(Runtime):
        def gather_objects(self, item: dict[str, str]) -> list[dict[str, str]]:
            return [item, others]

    loaders = []
    for _ in range(2):
        loaders.append(ResumableLoader(ImageFolder(root, image_size=8, class_cond=False), batch_size=2))
        os.utime(root / "03.png")
    others = {"number": "20", **{key: value for key, value in loaders[1].identity.items() if key != "times"}}
    assembly._check_same_data(loaders[0], Pair())
    others["sizes"] = "other"
    with pytest.raises(ValueError, match="data.dataset: rank 1 has other data than rank 0: other sizes"):
        assembly._check_same_data(loaders[0], Pair())
