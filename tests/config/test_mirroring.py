"""Which recipes and datasets mirror images: those that say so."""

import inspect
from pathlib import Path

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.config.loading import load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_only_the_recipes_that_say_so_mirror_images() -> None:
    files = [file for file in CONFIGS.rglob("*.yaml") if file != CONFIGS / "base.yaml"]
    datasets = {file: load_config(file, "train").data.dataset for file in files}
    mirroring = {file.parent.name for file in files if datasets[file].get("random_flip")}
    assert mirroring == {"imagenet_256", "unconditional"}


def test_no_dataset_mirrors_unless_asked() -> None:
    defaults = {
        name: parameter.default
        for name, builder in DATASETS.module_dict.items()
        if (parameter := inspect.signature(builder).parameters.get("random_flip")) is not None
    }
    # None: a cache mirrors if it was written with mirrored images.
    assert defaults.pop("LatentCache") is None
    assert {"ImageFolder", "ImageCaptions"} <= set(defaults)
    assert set(defaults.values()) == {False}
