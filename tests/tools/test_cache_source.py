"""What a latent cache says about images that changed since they were encoded."""

import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from tars import shards

from speedit_plugins.registry import DATASETS, build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.latents.source import compare_with_source, identity_of

TOOL = Path(__file__).parents[2] / "tools" / "cache_latents.py"
NUM_IMAGES = 11


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cache_latents", TOOL)
    module = importlib.util.module_from_spec(spec)
    # `dataclass` looks the module up in `sys.modules`.
    sys.modules["cache_latents"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes a config whose latents are pixels, and a folder of images in three classes."""
    folder = tmp_path_factory.mktemp("experiment")
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, 12, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        path = folder / "images" / f"class_{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    content = {
        "experiment_dir": str(folder / "run"),
        "num_classes": 3,
        "image_size": 8,
        "model": {"type": "DiT", "patch_size": 4, "hidden_size": 8, "depth": 1, "num_heads": 2},
        "encoder": {"type": "Pixels"},
        "data": {"dataset": {"type": "ImageFolder", "root": str(folder / "images")}, "batch_size": 4},
        "max_training_steps": 1,
    }
    (folder / "experiment.yaml").write_text(json.dumps(content))
    return folder / "experiment.yaml"


def copied(config: Path, target: Path) -> list[str]:
    """A copy of the images, with old times, and the override that trains on it."""
    shutil.copytree(load_config(config, "train").data.dataset["root"], target)
    for path in target.rglob("*.png"):
        os.utime(path, (1e9, 1e9))
    return [f"data.dataset.root={target}"]


def swap(path: Path) -> None:
    """Another picture under the same name."""
    Image.new("RGB", (30, 30), "red").save(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap, r"files have other sizes \(1 of 11, the first is sample 5, class_1/10.png\)"),
        (lambda path: os.utime(path), r"files were written again \(1 of 11, the first is .*class_1/10.png\)"),
        (
            lambda path: path.rename(path.with_name("11.png")),
            r"the names differ \(1 of 11, .* class_1/11.png\)",
        ),
        (
            lambda path: path.parent.rename(path.parent.with_name("class_1b")),
            "the names differ .*; the classes",
        ),
    ],
)
def test_a_cache_of_images_that_changed_is_refused(
    tool: ModuleType,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], object],
    message: str,
) -> None:
    overrides = copied(config, tmp_path / "images")
    command = ["-c", str(config), "--out", str(tmp_path / "cache"), *overrides]
    assert tool.main(command) == 0
    cached = {"type": "LatentCache", "root": str(tmp_path / "cache")}
    assert len(build(DATASETS, cached)) == 11
    change(tmp_path / "images" / "class_1" / "10.png")
    stale = "the cache in .*cache is stale, the data that it was made from changed: "
    with pytest.raises(ValueError, match=f"{stale}{message}.*check_source: false trains from it as it is"):
        build(DATASETS, cached)
    assert len(build(DATASETS, {**cached, "check_source": False})) == 11
    # The tool does not go on with it either.
    capsys.readouterr()
    assert tool.main(command) == 2
    assert re.search(f"error: {stale}{message}", capsys.readouterr().err)


def test_data_that_were_moved_or_copied_as_a_whole_have_not_changed(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = copied(config, tmp_path / "images")
    command = ["-c", str(config), "--out", str(tmp_path / "cache")]
    assert tool.main([*command, *overrides]) == 0
    (tmp_path / "images").rename(tmp_path / "moved")
    capsys.readouterr()
    assert tool.main([*command, f"data.dataset.root={tmp_path / 'moved'}"]) == 0
    assert "0 of them encoded now" in capsys.readouterr().out
    cached = {"type": "LatentCache", "root": str(tmp_path / "cache")}
    build(DATASETS, cached)
    assert (
        f"not compared with its images: they are no longer in {tmp_path / 'images'}"
        in capsys.readouterr().out
    )
    (tmp_path / "moved").rename(tmp_path / "images")
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path)
    build(DATASETS, cached)
    assert "were all written again, at the same sizes, as by a copy" in capsys.readouterr().out


@pytest.mark.parametrize("root", [["0.tar", "1.tar"], "*.tar", "{0..1}.tar"])
def test_archives_are_compared_by_list_and_pattern(tmp_path: Path, root: str | list[str]) -> None:
    shards(tmp_path, 2)
    for number, path in enumerate(sorted(tmp_path.glob("*.tar"))):
        path.rename(tmp_path / f"{number}.tar")
    named = str(tmp_path / root) if isinstance(root, str) else [str(tmp_path / name) for name in root]
    options = {"type": "WebDataset", "root": named}
    data = build(DATASETS, options, image_size=8, class_cond=False, text=False)
    made_from = {"dataset": options, "class_cond": False, "image_size": 8, **identity_of(data)}
    assert compare_with_source(tmp_path, made_from, has_text=False) == []
    (tmp_path / "1.tar").write_bytes((tmp_path / "0.tar").read_bytes())
    with pytest.raises(ValueError, match="is stale, the data that it was made from changed"):
        compare_with_source(tmp_path, made_from, has_text=False)
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"cannot be compared with its images: .*no file.*\.tar"):
        compare_with_source(tmp_path, made_from, has_text=False)


def test_a_cache_of_an_earlier_version_is_used_with_a_line(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-c", str(config), "--out", str(tmp_path)]
    assert tool.main(command) == 0
    index = json.loads((tmp_path / "index.json").read_text())
    names = build(DATASETS, {"type": "LatentCache", "root": str(tmp_path)}).classes
    assert list(names) == index["made_from"]["classes"]
    assert len(names) == index["made_from"]["num_classes"]
    del index["made_from"]["identity"], index["made_from"]["classes"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    capsys.readouterr()
    assert tool.main(command) == 0
    said = f"the cache in {tmp_path} is not compared with its images: it does not say what"
    assert said in capsys.readouterr().out
    older = build(DATASETS, {"type": "LatentCache", "root": str(tmp_path)})
    assert set(older.identity()) == {"latents"}
    assert older.classes == ()
    assert said in capsys.readouterr().out


def test_a_random_crop_is_not_cached(
    tool: ModuleType, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["-c", str(config), "--out", str(tmp_path), "data.dataset.fit=random_crop"]) == 2
    assert "wanted fit: crop or pad, got random_crop" in capsys.readouterr().err


def test_a_cache_of_captions_that_were_edited_is_refused(tool: ModuleType, tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (80 * number, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"red {number}")
    dataset = f"data.dataset={{type: ImageCaptions, root: {tmp_path / 'images'}}}"
    assert (
        tool.main(["-c", "configs/text_to_image/emoji.yaml", "--out", str(tmp_path / "cache"), dataset]) == 0
    )
    (tmp_path / "images" / "1.txt").write_text("blue 1")
    with pytest.raises(
        ValueError, match=r"stale, .*: the captions differ \(1 of 3, the first is sample 1, 1.png\)"
    ):
        build(DATASETS, {"type": "LatentCache", "root": str(tmp_path / "cache")})
