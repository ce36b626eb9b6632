"""Our trainer as a contestant of the race: `ours.yaml` has a name and a config for each.

A step is `Trainer.optimizer_step`, with our loader, policy, optimizer and average.

Dims: B samples, C channels, H x W pixels.
"""

import json
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.func import functional_call

from benchmarks.image_sets import ImageSet
from benchmarks.overrides import merged
from benchmarks.race.hosts import LR
from benchmarks.race.training import Denoiser, Net, Terms, count_parameters
from speedit_plugins.registry import DATASETS, nearest
from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.models import training_only
from speedit_plugins.trainer.results import CHECKPOINTS
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.products.choice import choose_products

ROWS = Path(__file__).with_suffix(".yaml")


def read_rows(path: Path = ROWS) -> dict[str, dict[str, Any]]:
    """Name -> what its config has beyond the race's own, in the order of the file."""
    rows: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return rows


def row_of(name: str, rows: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The row of this name; ValueError for an unknown one."""
    if name not in rows:
        known = "; ".join(rows)
        raise ValueError(f"unknown contestant {name!r}{nearest(name, rows)}; known: {known}")
    return rows[name]


def check_config(name: str, row: Mapping[str, Any], net: Net, terms: Terms) -> None:
    """Raises ValueError, which begins with the contestant's name, if its config is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(json.dumps(merged(own_config(net, terms, Path(folder)), row)), encoding="utf-8")
        try:
            load_config(path, "train")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


class OurTraining:
    """A training of ours; see `race.training.Training`.

    Args:
        row: what the config has beyond the race's own.
        net: the common model.
        data: what is trained on.
        terms: as for the peers.
        folder: where its checkpoints are.
    """

    def __init__(self, row: Mapping[str, Any], net: Net, data: ImageSet, terms: Terms, folder: Path) -> None:
        RaceImages.data = data
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "config.yaml"
        content = merged(own_config(net, terms, folder), row)
        self._path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        config = load_config(self._path, "train")
        self._trainer = build_trainer(config)
        choose_products(self._trainer.model, config, self._trainer.runtime)
        self.process = build.build_process(config, respaced=False)
        own, extra = count_parameters(self._trainer.model, f"{training_only.CHILD}.")
        self.num_parameters, self.num_training_only = own, extra
        self._checkpoints = folder / CHECKPOINTS

    def turn(self) -> AbstractContextManager[None]:
        # The trainer seeds every step itself.
        return nullcontext()

    def step(self) -> None:
        self._trainer.engine.model.train()
        self._trainer.optimizer_step()

    def denoiser(self) -> Denoiser:
        trainer = self._trainer
        shown = {**trainer.engine.untrained(), **trainer.averaged_weights()}
        trainer.model.eval()

        def denoise(x: Tensor, timestep: Tensor, labels: Any) -> Tensor:
            found: Tensor = functional_call(trainer.model, shown, (x, timestep, labels))
            return found

        return denoise

    def save(self, folder: Path) -> None:
        (folder / "checkpoint").write_text(self._trainer.save().name, encoding="utf-8")

    def load(self, folder: Path) -> None:
        self._trainer.restore(self._checkpoints / (folder / "checkpoint").read_text(encoding="utf-8"))


def own_config(net: Net, terms: Terms, folder: Path) -> dict[str, Any]:
    """The config that all our contestants share."""
    return {
        "experiment_dir": str(folder),
        "seed": terms.seed,
        "device": terms.device,
        "num_classes": net.num_classes,
        "image_size": net.image_size,
        "model": {
            "type": "DiT",
            "input_size": net.image_size,
            "patch_size": net.patch_size,
            "in_channels": net.channels,
            "hidden_size": net.width,
            "depth": net.depth,
            "num_heads": net.num_heads,
            "num_classes": net.num_classes,
        },
        "encoder": {"type": "Pixels", "channels": net.channels},
        "data": {"dataset": {"type": "RaceImages"}, "batch_size": terms.batch_size},
        "optimizer": {"type": "AdamW", "lr": LR * terms.lr_factor},
        "ema": {"type": "halflife", "halflife_steps": terms.ema_halflife},
        "max_training_steps": terms.steps,
        "keep_last": 2,
    }


class RaceImages:
    """A labelled dataset in memory, set by `OurTraining`."""

    data = ImageSet(torch.empty(0), None, 0)

    def __init__(self) -> None:
        self._images, self.num_classes = self.data.images, self.data.num_classes
        assert self.data.labels is not None
        self._labels = self.data.labels.tolist()

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """An image (C, H, W) in [-1, 1] and its label."""
        return {"image": self._images[index], "label": self._labels[index]}


DATASETS.register_module(name="RaceImages", module=RaceImages)
