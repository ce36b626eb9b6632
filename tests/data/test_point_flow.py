import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from speedit_plugins.trainer.data.shapes.point_flow import SYNSETS, ShapeNetPointFlow

SIZES = {"02691156": {"train": 3, "val": 2, "test": 1}, "03001627": {"train": 2, "val": 1, "test": 1}}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two categories in PointFlow's layout, of other means and spreads, different on each axis."""
    folder, rng = tmp_path_factory.mktemp("pc15k"), np.random.default_rng(0)
    for number, (synset, splits) in enumerate(SIZES.items()):
        for split, size in splits.items():
            (folder / synset / split).mkdir(parents=True)
            for name in range(size):
                points = rng.normal([number, 0.5, -1], [1, 2, 0.5 + number], (15_000, 3))
                np.save(folder / synset / split / f"{name}.npy", points.astype(np.float32))
    return folder


def test_points_are_those_of_the_files_with_the_statistics_of_the_training(root: Path) -> None:
    dataset = ShapeNetPointFlow(root, num_points=2048)
    assert (len(dataset), dataset.classes, dataset.num_classes) == (5, ("airplane", "chair"), 2)
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1]
    files = sorted(root.glob("*/train/*.npy"))
    everything = np.concatenate([np.load(file) for file in files]).astype(np.float64)
    assert_close(dataset.normalization.mean, tuple(everything.mean(axis=0).tolist()), atol=1e-9, rtol=0)
    assert_close(dataset.normalization.std, float(everything.std()), atol=1e-9, rtol=0)
    sample = dataset.load(3, generator())
    assert sample["label"] == 1
    points = dataset.normalization.invert(sample["points"]).T
    own = torch.from_numpy(np.load(files[3]))
    distances = torch.cdist(points, own, compute_mode="donot_use_mm_for_euclid_dist")
    # Drawn from the first 10,000, each at most once.
    assert distances.min(dim=1).values.max() < 1e-5
    assert len(distances.argmin(dim=1).unique()) == 2048
    assert distances.argmin(dim=1).max() < 10_000


def test_val_and_test_are_fixed_points_of_the_end_with_the_training_statistics(root: Path) -> None:
    trained, held = ShapeNetPointFlow(root), ShapeNetPointFlow(root, split="val", num_points=5000)
    assert held.normalization == trained.normalization
    assert held.name(2) == "03001627/val/0.npy"
    points = held.normalization.invert(held.load(2, generator(1))["points"]).T
    own = torch.from_numpy(np.load(root / "03001627/val/0.npy"))[10_000:]
    assert_close(points, own, atol=1e-5, rtol=0)
    given = ShapeNetPointFlow(root, split="test", mean=held.normalization.mean, std=held.normalization.std)
    assert given.normalization == held.normalization


def test_categories_go_by_name_or_number_and_give_the_labels(root: Path) -> None:
    dataset = ShapeNetPointFlow(root, categories=["chair", "02691156"])
    assert dataset.classes == ("chair", "airplane")
    assert dataset.name(0).startswith("03001627")
    alone = ShapeNetPointFlow(root, categories=["chair"], class_cond=False)
    assert (len(alone), alone.num_classes, alone.load(1, generator())["label"]) == (2, 0, 0)
    assert alone.normalization != dataset.normalization
    assert len(set(SYNSETS.values())) == len(SYNSETS) == 55


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "split in .*got 'valid'"),
        ({"num_points": 10_001}, "num_points in 1..10000 for train, got 10001"),
        ({"num_points": 5001, "split": "test"}, "num_points in 1..5000 for test, got 5001"),
        ({"categories": ["chiar"]}, "unknown category 'chiar'; did you mean 'chair'"),
        ({"categories": ["chair", "03001627"]}, "different categories"),
        ({"categories": ["sofa"]}, "found no .npy files in .*04256520"),
    ],
)
def test_wrong_options_are_named(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShapeNetPointFlow(root, **options)


def test_a_file_with_another_number_of_points_is_named(tmp_path: Path) -> None:
    (tmp_path / "02691156" / "train").mkdir(parents=True)
    np.save(tmp_path / "02691156" / "train" / "x.npy", np.ones((2048, 3)))
    with pytest.raises(ValueError, match=r"x\.npy has 2048 points; wanted PointFlow's 15000"):
        ShapeNetPointFlow(tmp_path)


@pytest.mark.hosts
def test_statistics_and_held_out_points_are_those_of_the_loader_of_dit3d(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout = Path(os.environ.get("SPEEDIT_HOSTS") or "") / "DiT-3D+DiT-3D"
    source = checkout / "datasets" / "shapenet_data_pc.py"
    if not os.environ.get("SPEEDIT_HOSTS") or not source.is_file():
        pytest.skip("needs $SPEEDIT_HOSTS with a checkout DiT-3D+DiT-3D")
    # It is imported for masks, which are off.
    monkeypatch.setitem(sys.modules, "open3d", ModuleType("open3d"))
    host: dict[str, Any] = {}
    exec(compile(source.read_text(), str(source), "exec"), host)
    options = {"root_dir": str(root), "categories": ["airplane", "chair"], "te_sample_size": 2048}
    theirs = host["ShapeNet15kPointClouds"](split="train", **options)
    ours = ShapeNetPointFlow(root)
    # Theirs are float32 sums of 225,000 numbers.
    assert_close(ours.normalization.mean, tuple(theirs.all_points_mean.ravel().tolist()), atol=1e-4, rtol=0)
    assert_close(ours.normalization.std, float(theirs.all_points_std.item()), atol=1e-4, rtol=0)
    statistics = {"all_points_mean": theirs.all_points_mean, "all_points_std": theirs.all_points_std}
    held, own = (
        host["ShapeNet15kPointClouds"](split="val", **options, **statistics),
        ShapeNetPointFlow(root, split="val"),
    )
    assert len(held) == len(own) == 3
    found = {own.name(index): own.load(index, generator()) for index in range(3)}
    for item in held:
        mine = found[f"{item['sid']}/{item['mid']}.npy"]
        assert mine["label"] == item["cate_idx"]
        assert_close(mine["points"].T, item["test_points"], atol=1e-3, rtol=0)
