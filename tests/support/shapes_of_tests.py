"""Small shapes for trainings of tests: boxes as solids, and clouds on the surface of ellipsoids."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.shapes.normalization import Normalization


class SmallShapes:
    """64 shapes of two classes, flat and tall, as voxels (1, V, V, V) or as points (3, N).

    Args:
        voxel_size: V.
        num_points: N; 0 gives voxels.
        found: key of the samples, in place of the right one.
        bad: "nan" or "size", what is wrong with the samples.
    """

    num_classes = 2
    classes = ("flat", "tall")

    def __init__(self, *, voxel_size: int, num_points: int = 0, found: str = "", bad: str = "") -> None:
        self.edge, self.num_points, self.bad = voxel_size, num_points, bad
        self.form = "points" if num_points else "voxels"
        self.key = found or self.form
        # Not that of the points below, so that one sees whether it was undone.
        self.normalization = Normalization((10.0, 20.0, 30.0), 0.5) if num_points else None

    def __len__(self) -> int:
        return 64

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        own = torch.Generator().manual_seed(index)
        label = index % 2
        shape = self._solid(own, label) if self.form == "voxels" else self._cloud(own, label)
        if self.bad == "nan":
            shape.view(-1)[3] = torch.nan
        return {self.key: shape[..., 1:] if self.bad == "size" else shape, "label": label}

    def _solid(self, generator: torch.Generator, label: int) -> Tensor:
        solid = torch.full((1, self.edge, self.edge, self.edge), -1.0)
        sides = [self.edge // 2, self.edge // 2, self.edge // 2]
        sides[label] = self.edge // 4
        x, y, z = (int(torch.randint(self.edge - side + 1, (), generator=generator)) for side in sides)
        solid[:, x : x + sides[0], y : y + sides[1], z : z + sides[2]] = 1.0
        return solid

    def _cloud(self, generator: torch.Generator, label: int) -> Tensor:
        points = torch.randn(3, self.num_points, generator=generator)
        points = points / points.norm(dim=0)
        points[label] *= 0.3
        return points / points.std()


DATASETS.register_module(name="SmallShapes", module=SmallShapes)

CONFIG = """
num_classes: 2
voxel_size: 8
model: {type: DiT3D, patch_size: 2, hidden_size: 24, depth: 2, num_heads: 2}
encoder: {type: Voxels}
data: {dataset: {type: SmallShapes}, batch_size: 8}
optimizer: {lr: 2e-3, warmup_steps: 0}
ema: {type: halflife, halflife_steps: 20.0}
max_training_steps: 10
log_every: 5
ckpt_every: 1000
enable_tensorboard_log: false
sampler: {num_steps: 4}
sample_classes: [0, 1]
guidance_scale: 2.0
"""
POINTS = ("num_points=40", "encoder={type: Points}")
FLOW = "diffusion={type: RectifiedFlow}"


def shape_config(folder: Path, *overrides: str, phase: str = "train") -> ExperimentConfig:
    """The config of a small run on shapes in `folder`, checked."""
    return load_config(config_file(folder), phase, [f"experiment_dir={folder / 'run'}", *overrides])


def config_file(folder: Path) -> Path:
    """A file with `CONFIG` in the folder, which is made."""
    folder.mkdir(exist_ok=True)
    path = folder / "shapes.yaml"
    path.write_text(CONFIG)
    return path
