"""tools/unpack_furniture.py on catalogues made here, in the layout of Sweet Home 3D's."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from speedit_plugins.trainer.data.shapes.folder import ShapeFolder
from tools.unpack_furniture import main

pytest.importorskip("trimesh")

LIST = """# PluginFurnitureCatalog.properties
license=CC0
id#1=Someone#stool
name#1=Bar stool
category#1=Living room
model#1=/models/stool.obj
creator#1=Someone

name#2=Box
category#2=Kitchen
model#2=/models/box.obj
"""
# A box of 1 x 1 x 1: eight corners, six squares.
CUBE = (
    "".join(f"v {x} {y} {z}\n" for x in (0, 1) for y in (0, 1) for z in (0, 1))
    + "f 1 2 4 3\nf 5 7 8 6\nf 1 5 6 2\nf 3 4 8 7\nf 1 3 7 5\nf 2 6 8 4\n"
)


def _catalogue(folder: Path, *, models: tuple[str, ...] = ("stool", "box")) -> Path:
    folder.mkdir()
    with zipfile.ZipFile(folder / "Made.sh3f", "w") as archive:
        archive.writestr("PluginFurnitureCatalog.properties", LIST)
        for name in models:
            archive.writestr(f"models/{name}.obj", CUBE)
    return folder


def test_the_data_set_has_a_folder_per_room_and_names_authors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = _catalogue(tmp_path / "source"), tmp_path / "new" / "furniture"
    assert main([str(source), str(output), "--voxel-size", "8"]) == 0
    # How far it is.
    assert "Made.sh3f: 100%" in (said := capsys.readouterr().err)
    assert " 2/2 " in said
    data = ShapeFolder(output, voxel_size=8)
    assert data.classes == ("kitchen", "living_room")
    assert [data.name(index) for index in range(2)] == [
        "kitchen/Made_002_box.npy",
        "living_room/Made_001_bar_stool.npy",
    ]
    # A cube fills its box.
    assert torch.equal(data.load(0, torch.Generator())["voxels"], torch.ones(1, 8, 8, 8))
    assert np.load(output / data.name(0)).dtype == bool
    attribution = (output / "ATTRIBUTION.md").read_text()
    assert "## Made.sh3f: CC0" in attribution
    assert "- living_room/Made_001_bar_stool.npy: Someone\n" in attribution
    assert "- kitchen/Made_002_box.npy: no author named\n" in attribution


def test_a_damaged_catalogue_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = _catalogue(tmp_path / "source", models=("stool",))
    assert main([str(source), str(tmp_path / "output")]) == 2
    assert "Made.sh3f is damaged" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["empty", "output"], "no .sh3f files in"),
        (["source", "source"], "is not empty; wanted a new folder"),
        (["source", "output", "--voxel-size", "0"], "--voxel-size needs 1 or more, got 0"),
    ],
)
def test_wrong_folders_and_sizes_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _catalogue(tmp_path / "source")
    folders = [str(tmp_path / name) for name in options[:2]]
    assert main([*folders, *options[2:]]) == 2
    assert message in capsys.readouterr().err
