"""Tars, Parquet files and saved folders in place of a folder of images: the same training, cache and test."""

import importlib.util
import io
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from runs import arguments

from speedit_plugins.cli import main
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.latents.shards import TensorShards
from speedit_plugins.trainer.sampling.files.sample_sets import dataset_set

webdataset = pytest.importorskip("webdataset")
datasets = pytest.importorskip("datasets")

CLASSES = ("ant", "bee")
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as `folder/CLASS/NUMBER.png`, in four tars, as Parquet and as a saved dataset."""
    root = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 8, 8, 3), dtype=np.uint8)
    rows = []
    # Sorted by class and name, as a folder is.
    for number, image in enumerate(pixels):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        label = number * 2 // NUM_IMAGES
        path = root / "folder" / CLASSES[label] / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
        rows.append({"image": {"bytes": content.getvalue(), "path": path.name}, "label": label})
    (root / "tars").mkdir()
    for shard in range(4):
        with webdataset.TarWriter(str(root / "tars" / f"{shard:02d}.tar")) as writer:
            for number in range(6 * shard, 6 * shard + 6):
                sample = {"png": rows[number]["image"]["bytes"], "cls": CLASSES[rows[number]["label"]]}
                writer.write({"__key__": f"{number:02d}", **sample})
    datasets.disable_progress_bars()
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(CLASSES)))
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(root / "parquet" / "train.parquet", batch_size=6)
    table.save_to_disk(root / "saved")
    return root


def section(data: Path, kind: str) -> str:
    root, name = {
        "folder": ("folder", "ImageFolder"),
        "tars": ("tars/{00..03}.tar", "WebDataset"),
        "parquet": ("parquet", "ParquetImages"),
        "saved": ("saved", "SavedDataset"),
    }[kind]
    window = ", shuffle_window: 1" if kind == "tars" else ""
    return f"data.dataset={{type: {name}, root: '{data}/{root}'{window}}}"


def overrides(data: Path, kind: str, folder: Path, **changes: object) -> list[str]:
    channels = ["encoder.channels=3", "model.in_channels=3", "num_classes=2", "sample_classes=[0]"]
    small = {"data__batch_size": 4, "sample_every": 0, **changes}
    return [*arguments(folder, **small), *channels, section(data, kind)]


DIGITS = "configs/image/digits/speedit.yaml"
KINDS = ("tars", "parquet", "saved")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_within_an_epoch_to_the_bit(
    data: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def weights(name: str, *steps: int) -> bytes:
        for count in steps:
            command = overrides(
                data, kind, tmp_path / name, max_training_steps=count, optimizer__schedule="constant"
            )
            assert main(["-c", DIGITS, "-p", "train", *command]) == 0
        return (tmp_path / name / "checkpoints" / f"step_{count:07d}" / "model.safetensors").read_bytes()

    # An epoch has six steps.
    whole = weights("whole", 9)
    said = capsys.readouterr().out.splitlines()
    assert {"samples: 24", "classes: 2 (ant, bee)", "steps per epoch: 6 of 4 samples"} <= set(said)
    assert weights("halves", 4, 9) == whole
    # The same images in the same order, if they are not shuffled in windows.
    assert (weights_of_folder(data, tmp_path) == whole) == (kind != "tars")


def weights_of_folder(data: Path, tmp_path: Path) -> bytes:
    """Weights of the same training on the folder of images."""
    changes = {"max_training_steps": 9, "optimizer__schedule": "constant"}
    assert (
        main(["-c", DIGITS, "-p", "train", *overrides(data, "folder", tmp_path / "folder", **changes)]) == 0
    )
    return (tmp_path / "folder" / "checkpoints" / "step_0000009" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "cache_latents.py"
    spec = importlib.util.spec_from_file_location("cache_latents", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # `dataclass` looks the module up in `sys.modules`.
    sys.modules["cache_latents"] = module
    spec.loader.exec_module(module)
    return module


def test_the_cache_of_latents_is_that_of_the_folder(data: Path, tmp_path: Path, tool: ModuleType) -> None:
    for kind in ("folder", *KINDS):
        out = ["--out", str(tmp_path / kind), "--shard-size", "10"]
        assert tool.main(["-c", DIGITS, *overrides(data, kind, tmp_path / "run"), *out]) == 0
    caches = {kind: TensorShards(tmp_path / kind) for kind in ("folder", *KINDS)}
    names = tuple(caches["folder"].index.tensors)
    assert "label" in names
    for kind in KINDS:
        assert len(caches[kind]) == NUM_IMAGES
        for index in range(NUM_IMAGES):
            expected, found = (caches[each].load(index, names) for each in ("folder", kind))
            assert all(torch.equal(found[name], expected[name]) for name in names)


def test_a_cache_notices_that_its_tars_changed(
    data: Path, tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "tars", tmp_path / "tars")
    command = ["-c", DIGITS, *overrides(tmp_path, "tars", tmp_path / "run"), "--out", str(tmp_path / "cache")]
    assert tool.main(command) == 0
    with webdataset.TarWriter(str(tmp_path / "tars" / "03.tar")) as writer:
        for number in range(18, 24):
            image = (data / "folder" / CLASSES[1] / "12.png").read_bytes()
            writer.write({"__key__": f"{number:02d}", "png": image, "cls": "ant"})
    capsys.readouterr()
    assert tool.main(command) == 2
    assert "is stale, the data that it was made from changed: the labels differ" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_a_test_is_that_of_the_folder(data: Path, tmp_path: Path, kind: str) -> None:
    expected, found = (
        dataset_set(load_config(DIGITS, "test", overrides(data, each, tmp_path))) for each in ("folder", kind)
    )
    assert len(found) == len(expected) == NUM_IMAGES
    for index in range(NUM_IMAGES):
        assert torch.equal(found._read(index), expected._read(index))
