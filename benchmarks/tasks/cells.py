"""The tasks of benchmarks/tasks: stages of a cascade of emoji, and shapes. All data are embedded.

Dims: N samples, C channels, H x W pixels, P points.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.compose.arms import FLOW
from benchmarks.compose.judges import Judge as ImageJudge
from benchmarks.compose.results import Training
from benchmarks.compose.sets import CLASSIFIER, NETWORK, NUM_SUBJECTS, PIXELS
from benchmarks.compose.training import SAMPLERS, Settings
from benchmarks.flow.spaces import NETWORK_SIDE, Space, of_images, of_network
from benchmarks.overrides import merged
from benchmarks.tasks.arms import Policy
from benchmarks.tasks.measures import Enlargements, Judge, Sets, chamfer_to, frechet_to
from speedit_plugins.trainer.data.images.emoji import Emoji
from speedit_plugins.trainer.data.shapes.solid_digits import SolidDigits
from speedit_plugins.trainer.evaluation.features import Pixels
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0
from speedit_plugins.trainer.evaluation.shape_classifier import ShapeClassifier

WIDTH, DEPTH, NUM_HEADS = 96, 4, 4
FACTOR, AUGMENTATION = 2, 0.2
SETTINGS = Settings(horizon=400, lr=2e-3, num_samples=200, sampling_steps=10)
# Policies of a task on a flow and on a Gaussian process. `auto` is `spectral` for a model of noise; for one
# whose sampler clamps it is another law.
_USUAL = {
    FLOW: ("uniform", "speedit", "spectral", "auto"),
    "": ("uniform", "speedit", "spectral", "auto_clamped"),
}
# A stage's are also placed by what its input leaves open, and all over the range of log-SNR.
_SWEPT = {FLOW: "auto", "": "spectral"}
_SWEEP = ("-5", "-1", "0.5", "4", "6")


@dataclass(frozen=True)
class Task:
    """What is trained and measured, whatever the policy.

    Args:
        config: keys of a config beside those that all tasks share.
        judge: makes what measures it, with a folder for its files.
        is_clamped: the sampler clamps x_0 to [-1, 1].
        is_stage: it is given a low-resolution input.
    """

    config: Mapping[str, Any]
    judge: Callable[[Path], Judge]
    is_clamped: bool = True
    is_stage: bool = False


@dataclass(frozen=True)
class Cell:
    """A task on a process: what is compared is of one cell.

    Args:
        task: name in `TASKS`.
        process: `flow`, or a noise schedule for a model of noise.
        folder: for the files of judges.
        settings: that all policies share.
    """

    task: str
    process: str
    folder: Path
    settings: Settings = field(default=SETTINGS)

    @classmethod
    def named(cls, name: str, folder: Path, settings: Settings) -> "Cell":
        """The cell of a name in `CELLS`."""
        return cls(*name.split("/"), folder, settings)

    def __str__(self) -> str:
        return f"{self.task}, {self.process}"

    @property
    def kind(self) -> Task:
        """The task."""
        return TASKS[self.task]

    def policies(self) -> list[Policy]:
        """Those that are compared if the command line names none, in order."""
        key = FLOW if self.process == FLOW else ""
        names = [name for name in _USUAL[key] if self.kind.is_clamped or name != "auto_clamped"]
        if self.kind.is_stage:
            swept = _SWEPT[key]
            names += [f"{swept}@rest", *(["spectral@rest"] if key == FLOW else [])]
            names += [f"{swept}@{centre}" for centre in _SWEEP]
        return [Policy.named(name) for name in names]

    def judge(self) -> Judge:
        """What measures the trainings."""
        return _judge(self.task, self.folder)

    def config(self, seed: int, policy: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of a config, all but `experiment_dir`."""
        settings = self.settings
        process = {"type": "RectifiedFlow"}
        if self.process != FLOW:
            process = {"learn_sigma": False, "noise_schedule": self.process}
        shared = {
            "seed": seed,
            "device": "cpu",
            "num_classes": 0,
            "model": {
                "hidden_size": WIDTH,
                "depth": DEPTH,
                "num_heads": NUM_HEADS,
                "class_dropout_prob": 0.0,
            },
            "diffusion": {**process, "policy": dict(policy)},
            "data": {"batch_size": settings.batch_size},
            "optimizer": {"type": "AdamW", "lr": settings.lr, "warmup_steps": settings.warmup_steps},
            "ema": {"halflife_steps": settings.halflife_steps},
            "max_training_steps": settings.horizon,
            "sampler": {
                "type": SAMPLERS[FLOW if self.process == FLOW else "epsilon"],
                "num_steps": settings.sampling_steps,
                "clip_sample": self.kind.is_clamped,
            },
            "per_proc_batch_size": 100,
        }
        return merged(shared, self.kind.config)

    def training(self, policy: Policy, seed: int) -> Training:
        """What identifies a training, without its results."""
        config = {key: value for key, value in self.config(seed, policy.section()).items() if key != "seed"}
        options = json.loads(json.dumps(asdict(self.settings)))
        return Training(self.task, self.process, policy.name, seed, config, options)


@cache
def _judge(task: str, folder: Path) -> Judge:
    return TASKS[task].judge(folder)


def _emoji(side: int) -> Tensor:
    """All emoji, float32 (N, 3, side, side)."""
    emoji, generator = Emoji(image_size=side), torch.Generator()
    return torch.stack([emoji.load(index, generator)["image"] for index in range(len(emoji))])


def _spaces(images: Tensor, folder: Path) -> dict[str, Space]:
    """Features of a classifier of emoji's subjects, and of an ImageNet network."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = torch.arange(len(images)) * NUM_SUBJECTS // len(images)
    classifier = ImageJudge(folder / f"judge_emoji_{images.shape[-1]}.safetensors", images, labels)
    return {CLASSIFIER: classifier, NETWORK: of_network(EfficientNetLite0(resize=NETWORK_SIDE))}


def _judge_of_emoji(folder: Path) -> Judge:
    images = _emoji(16)
    spaces = {**_spaces(images, folder), PIXELS: of_images(Pixels(pool=8))}
    return Sets({name: frechet_to(space, images) for name, space in spaces.items()}, images)


def _judge_of_enlargements(folder: Path) -> Judge:
    return Enlargements(_spaces(_emoji(FACTOR * 16), folder))


def _digits(key: str, split: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Solids or clouds of digits, and their labels."""
    digits, generator = SolidDigits(split=split, **options), torch.Generator().manual_seed(0)
    return torch.stack([digits.load(row, generator)[key] for row in range(len(digits))]), digits.labels


def _judge_of_solids(folder: Path) -> Judge:
    classifier = ShapeClassifier(*_digits("voxels", "train", voxel_size=16))
    solids, labels = _digits("voxels", "test", voxel_size=16)
    coarse = _coarse(4)
    return Sets(
        {CLASSIFIER: frechet_to(classifier, solids), "voxels@4": frechet_to(coarse, solids)}, solids, labels
    )


def _judge_of_clouds(folder: Path) -> Judge:
    classifier = ShapeClassifier(*_digits("points", "train", num_points=NUM_POINTS))
    clouds, labels = _digits("points", "test", num_points=NUM_POINTS)
    order = torch.randperm(len(clouds), generator=torch.Generator().manual_seed(1))
    distances = {CLASSIFIER: frechet_to(classifier, clouds), "chamfer": chamfer_to(clouds[order])}
    return Sets(distances, clouds, labels)


def _coarse(side: int) -> Space:
    """The means of solids in side^3 cells."""
    return lambda solids: functional.adaptive_avg_pool3d(solids, side).flatten(1)


NUM_POINTS = 256
_IMAGES = {"encoder": {"type": "Pixels", "channels": 3}, "data": {"dataset": {"type": "Emoji"}}}
_SHAPES = {"num_classes": 10, "data": {"dataset": {"type": "SolidDigits", "split": "train"}}}
# Every model has 64 tokens.
TASKS: Mapping[str, Task] = {
    "emoji_16": Task(
        merged(_IMAGES, {"image_size": 16, "model": {"type": "DiT", "patch_size": 2}}), _judge_of_emoji
    ),
    "emoji_16_to_32": Task(
        merged(
            _IMAGES,
            {
                "image_size": 16 * FACTOR,
                "model": {"type": "DiT", "patch_size": 4},
                "super_resolution": {"factor": FACTOR, "augmentation": AUGMENTATION},
                "data": {"held_out_samples": SETTINGS.num_samples},
            },
        ),
        _judge_of_enlargements,
        is_stage=True,
    ),
    "solids": Task(
        merged(
            _SHAPES,
            {
                "voxel_size": 16,
                "model": {"type": "DiT3D", "patch_size": 4},
                "encoder": {"type": "Voxels"},
            },
        ),
        _judge_of_solids,
    ),
    "clouds": Task(
        merged(
            _SHAPES,
            {
                "voxel_size": 16,
                "num_points": NUM_POINTS,
                "model": {"type": "DiT3D", "patch_size": 4},
                "encoder": {"type": "Points"},
            },
        ),
        _judge_of_clouds,
        is_clamped=False,
    ),
}
# TASK/PROCESS, the most wanted first.
CELLS = (
    "emoji_16_to_32/flow",
    "solids/flow",
    "emoji_16/flow",
    "emoji_16/cosine",
    "emoji_16_to_32/linear",
    "solids/linear",
    "clouds/linear",
    "clouds/flow",
)
