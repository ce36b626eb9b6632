"""DiT-3D's train.py, through the launcher, on handwritten digits as point clouds.

Dims: B batch, C channels, N points, R side of the voxels.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from speedit_plugins import NoiseSchedule
from speedit_plugins.trainer.data.images.digits import Digits
from whole_trainings.runs import Script, SmallModel
from whole_trainings.stand_ins import module_with
from whole_trainings.training import Part, Training

# Of chairs, in ShapeNet.
CATEGORY, FOLDER = "chair", "03001627"
# The host splits each cloud into 10,000 points for training and 5,000 for tests.
NUM_POINTS = 15_000
SIZES = {"patch_size": 4, "depth": 2, "hidden_size": 48, "num_heads": 4}
VOXELS = 16


class Kernels:
    """The host's CUDA kernels that its DiT calls, in torch."""

    @staticmethod
    def avg_voxelize_forward(features: Tensor, coords: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
        """Means of features (B, C, N) in voxels (B, C, R^3); the voxel of each point; the counts (B, R^3)."""
        x, y, z = coords.long().unbind(1)
        voxel = (x * side + y) * side + z
        count = torch.zeros(len(features), side**3).scatter_add_(1, voxel, torch.ones(voxel.shape))
        where = voxel[:, None].expand_as(features)
        total = features.new_zeros(*features.shape[:2], side**3).scatter_add_(2, where, features)
        return total / count.clamp(min=1)[:, None], voxel, count

    @staticmethod
    def avg_voxelize_backward(gradient: Tensor, voxel: Tensor, count: Tensor) -> Tensor:
        """The gradient (B, C, N) for one (B, C, R^3) of the means."""
        shared = gradient / count.clamp(min=1)[:, None]
        return shared.gather(2, voxel[:, None].expand(-1, gradient.shape[1], -1))

    @staticmethod
    def trilinear_devoxelize_forward(
        side: int, is_training: bool, coords: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features (B, C, N) at coords (B, 3, N), between voxels; these 8 and their weights (B, 8, N)."""
        low = coords.floor()
        part = coords - low
        places, weights = [], []
        for corner in range(8):
            bits = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1]).view(1, 3, 1)
            x, y, z = (low.long() + bits).clamp(max=side - 1).unbind(1)
            places.append((x * side + y) * side + z)
            weights.append(torch.where(bits == 1, part, 1 - part).prod(1))
        place, weight = torch.stack(places, 1), torch.stack(weights, 1)
        found = features.gather(2, place.flatten(1)[:, None].expand(-1, features.shape[1], -1))
        return (found.unflatten(2, place.shape[1:]) * weight[:, None]).sum(2), place, weight

    @staticmethod
    def trilinear_devoxelize_backward(gradient: Tensor, place: Tensor, weight: Tensor, side: int) -> Tensor:
        """The gradient (B, C, R^3) for one (B, C, N) of the features between voxels."""
        parts = (gradient[:, :, None] * weight[:, None]).flatten(2)
        where = place.flatten(1)[:, None].expand_as(parts)
        return gradient.new_zeros(*gradient.shape[:2], side**3).scatter_add_(2, where, parts)


class OnOneDevice(nn.Module):
    """torch's DataParallel for one device."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)


def install() -> list[str]:
    """Puts the kernels and what else this script needs in place. Returns what was replaced."""
    sys.modules["modules.functional.backend"] = module_with("modules.functional.backend", _backend=Kernels)
    nn.DataParallel = nn.parallel.DataParallel = OnOneDevice  # type: ignore[misc,assignment]  # a stand-in
    dist.init_process_group("nccl")
    return [
        "the host's CUDA kernels (the same sums in torch)",
        "DataParallel (one device)",
        "a process group (train.py ends one that --distribution_type single does not start)",
    ]


def float_schedule() -> NoiseSchedule:
    """The linear schedule with the host's alpha bars, which are float32. Its weights differ by up to 2e-4."""
    betas = np.linspace(1e-4, 0.02, 1000)
    return NoiseSchedule.from_alphas_cumprod(torch.from_numpy(np.cumprod(1 - betas)).float())


class DiT3D(Training):
    """A small DiT-3D."""

    name, folder, model = "DiT-3D", "DiT-3D+DiT-3D", "DiT"
    schedule = staticmethod(float_schedule)
    # A cloud has 15,000 points, so there are few.
    batch, num_epochs = 16, 16
    options = {
        "stand_ins": "whole_trainings.hosts.dit_3d.install",
        "script_class": ("GaussianDiffusion", "p_losses"),
        "unused": ("open3d", "tensorboardX", "trimesh", "utils_vit"),
        "small": (
            SmallModel("models.dit3d", "DiT", "DiT-small/4", SIZES, "DiT3D_models", ignores=("pretrained",)),
        ),
    }
    # test.py needs CUDA kernels for its measures; train.py samples at the end of an epoch if it is told to.
    samples = ("uniform", "plain")

    def prepare(self, host: Script) -> None:
        images, generator = Digits(image_size=16).images, np.random.default_rng(0)
        for split, count in (("train", self.batch * self.steps_per_epoch), ("val", 2)):
            folder = host.work / "shapes" / FOLDER / split
            folder.mkdir(parents=True)
            for index in range(count):
                bright = (images[index, 0].double().numpy() + 1).clip(0).flatten()
                place = generator.choice(len(bright), NUM_POINTS, p=bright / bright.sum())
                cloud = np.stack([place % 16, place // 16, generator.integers(0, 4, NUM_POINTS)], 1)
                cloud = (cloud + generator.random(cloud.shape)).astype(np.float32)
                np.save(folder / f"{index:04d}.npy", cloud)

    def arguments(self, work: Path, part: Part) -> list[str]:
        flags = {"model_dir": work / "checkpoints", "experiment_name": part.name, "dataroot": work / "shapes"}
        flags.update(category=CATEGORY, bs=self.batch, workers=0, niter=part.epochs, saveIter=1)
        flags.update(voxel_size=VOXELS, model_type="DiT-small/4", distribution_type="single")
        if part.name in self.samples:
            flags.update(vizIter=1)
        if part.resumed:
            flags.update(model=self.checkpoint(work, part.resumed, 1))
        return [*(text for name, value in flags.items() for text in (f"--{name}", str(value))), "--use_ema"]

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        return work / "checkpoints" / name / f"epoch_{epochs - 1}.pth"


HOSTS = (DiT3D(),)
