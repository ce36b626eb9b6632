"""A latent cache with a teacher's features, and trainings from it."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from speedit_plugins.trainer.accelerations.teachers import EmbeddedNetwork
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.data.loader import ResumableLoader
from speedit_plugins.trainer.logging.tracking import SilentTracker
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.interrupt import StopRequest

TOOL = Path(__file__).parents[2] / "tools" / "cache_latents.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cache_features", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # `dataclass` looks the module up in `sys.modules`.
    sys.modules["cache_features"] = module
    spec.loader.exec_module(module)
    return module


def arguments(folder: Path, *changes: str) -> list[str]:
    return [
        f"experiment_dir={folder / 'run'}",
        "image_size=8",
        "num_classes=2",
        "model={type: DiT, patch_size: 2, hidden_size: 8, depth: 1, num_heads: 2, in_channels: 3}",
        "encoder={type: Pixels, channels: 3}",
        "data.batch_size=4",
        "data.num_workers=0",
        "max_training_steps=2",
        *changes,
    ]


def test_a_training_from_the_cache_has_the_features_of_the_images(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        path = tmp_path / "images" / f"class_{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    base = "configs/image/digits/speedit.yaml"
    images = f"data.dataset={{type: ImageFolder, root: {tmp_path / 'images'}, random_flip: true}}"
    repa = "alignment={type: REPA, teacher: embedded, teacher_size: 32, layer: 1, projector_width: 8}"
    bare, whole = tmp_path / "bare", tmp_path / "whole"
    command = ["-c", base, *arguments(tmp_path, images), "--flip"]
    assert tool.main([*command, "--out", str(bare)]) == 0
    capsys.readouterr()
    assert tool.main([*command, "--out", str(whole), "--teacher", "embedded", "--teacher-size", "32"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].strip()
    assert last == "alignment={type: REPA, teacher: embedded, teacher_size: 32}"

    def trainer(folder: Path, *changes: str) -> Any:
        cached = f"data.dataset={{type: LatentCache, root: {folder}}}"
        return build_trainer(load_config(base, "train", arguments(tmp_path, cached, *changes)))

    live = build_trainer(load_config(base, "train", arguments(tmp_path, images, repa)))
    cached = trainer(whole, repa)
    calls: list[int] = []
    loaders = [ResumableLoader(each.loader.dataset, batch_size=4, seed=3) for each in (cached, live)]
    # Two epochs with random flips, which the maps share with the latents.
    for _ in range(4):
        ours, theirs = (
            each.inputs.encode(next(loader), [torch.Generator().manual_seed(i) for i in range(4)])
            for each, loader in zip((cached, live), loaders, strict=True)
        )
        assert_close(ours.latents, theirs.latents)
        # float16 keeps 11 bits; a convolution's last bits may depend on the batch.
        assert_close(ours.features, theirs.features, atol=2e-3, rtol=2**-10)
    monkeypatch.setattr(EmbeddedNetwork, "encode", lambda *given: calls.append(1))
    cached.fit(SilentTracker(), StopRequest())
    assert calls == []
    monkeypatch.undo()
    # Without an alignment nothing of the maps is read.
    assert "features" not in next(trainer(whole).loader)
    with pytest.raises(ValueError, match=r"a teacher's features, and the cache in .*bare has none; wanted"):
        trainer(bare, repa)
    with pytest.raises(ValueError, match=r"the features in .*whole were made by another teacher than"):
        trainer(whole, repa.replace("32", "64"))
