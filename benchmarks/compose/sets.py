"""The data sets of benchmarks/compose: images of 32 x 32 pixels and latents, with spaces that judge them.

benchmarks/flow/sets.py says how to make their files. The trainer reads them by the dataset `GivenTensors`.

Dims: N samples, C channels, H x W cells.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compose.judges import Judge
from benchmarks.compose.teacher import TeacherFeatures, teacher_features
from benchmarks.flow.sets import VENDORS, emoji, fashion
from benchmarks.flow.small_autoencoder import load_autoencoder
from benchmarks.flow.spaces import NETWORK_SIDE, Space, of_images, of_network
from benchmarks.speed.training_steps import GivenLatents
from speedit_plugins.registry import DATASETS, nearest
from speedit_plugins.trainer.data.identity import identify
from speedit_plugins.trainer.data.latents.cache import FEATURES
from speedit_plugins.trainer.evaluation.features import Pixels
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0

CLASSIFIER, PIXELS, NETWORK = "classifier", "pixels@8", "network"
SIDE = 32
# Enough to know 64 features well.
NUM_REFERENCE = 4000
# The emoji are in Unicode's order, by subject: faces, people, animals, food, ... Each run is a class.
NUM_SUBJECTS = 16


@dataclass(frozen=True, eq=False)
class ComposeSet:
    """What all arms of a data set share.

    Args:
        images: what is trained on, float32 (N, C, H, W); latents have mean 0 and variance 1.
        labels: int64 (N,), or None for an unconditional model.
        num_classes: 0 without labels.
        patch_size: so that a sample has 64 tokens.
        encoder: section of the config.
        build_spaces: makes `spaces` when they are first wanted.
        decode: from what the model makes to images in [-1, 1].
        teacher_file: where the features of REPA's teacher are kept.
    """

    images: Tensor
    labels: Tensor | None
    num_classes: int
    patch_size: int
    encoder: Mapping[str, Any]
    build_spaces: Callable[[], Mapping[str, Space]]
    decode: Callable[[Tensor], Tensor] = lambda images: images
    teacher_file: Path | None = None

    @cached_property
    def spaces(self) -> Mapping[str, Space]:
        """Name -> feature space of images."""
        return self.build_spaces()

    @cached_property
    def features(self) -> TeacherFeatures:
        """The features of REPA's teacher for every image; ValueError without a file to keep them in."""
        if self.teacher_file is None:
            raise ValueError("the data set has no teacher_file, wanted one")
        return teacher_features(self.teacher_file, self.images, self.decode)

    @property
    def is_pixels(self) -> bool:
        """Whether x_0 may be clamped to [-1, 1]."""
        return self.encoder["type"] == "Pixels"

    @property
    def reference(self) -> Tensor:
        """Samples of the data, evenly spread, at most twice `NUM_REFERENCE`."""
        return spread(self.images)


class GivenTensors:
    """A dataset of samples in memory, by the name that `give` gave them.

    Args:
        name: of a set.
        teacher: also give the features of REPA's teacher.
    """

    given: Mapping[str, ComposeSet] = {}

    def __init__(self, *, name: str, teacher: bool = False) -> None:
        self._name, data = name, self.given[name]
        self._images, self._labels, self.num_classes = data.images, data.labels, data.num_classes
        self._maps: Tensor | None = None
        if teacher:
            self._maps, self.teacher_fingerprint = data.features.maps, data.features.fingerprint

    def __len__(self) -> int:
        return len(self._images)

    def identity(self) -> dict[str, str]:
        """The name of the set."""
        return identify(contents=[self._name])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (C, H, W), "label" if there are labels, and a teacher's "features"."""
        sample: dict[str, Any] = {"image": self._images[index].clone()}
        if self._labels is not None:
            sample["label"] = int(self._labels[index])
        if self._maps is not None:
            sample[FEATURES] = self._maps[index].float()
        return sample


def give(name: str, data: ComposeSet) -> ComposeSet:
    """Lets the trainer read the set by its name."""
    GivenTensors.given = {**GivenTensors.given, name: data}
    return data


@cache
def load_compose_set(name: str, folder: Path) -> ComposeSet:
    """A data set by name, ready for the trainer; ValueError for an unknown name or a missing file."""
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}{nearest(name, SETS)}; known: {', '.join(SETS)}")
    try:
        return give(name, SETS[name](folder))
    except FileNotFoundError as error:
        raise ValueError(
            f"data set {name} has no file {error.filename}; benchmarks/flow/sets.py says how to make the"
            " files of --data-dir, and --data names the sets that are wanted"
        ) from error


def spread(values: Tensor) -> Tensor:
    """Every so many of the values (N, ...), at most twice `NUM_REFERENCE`."""
    return values[:: max(1, len(values) // NUM_REFERENCE)]


def _emoji(folder: Path) -> ComposeSet:
    images = emoji(folder, "twitter", SIDE)
    return ComposeSet(
        images,
        None,
        0,
        4,
        {"type": "Pixels", "channels": 3},
        partial(_emoji_spaces, folder),
        teacher_file=folder / "teacher_emoji_32.safetensors",
    )


def _fashion(folder: Path) -> ComposeSet:
    data = fashion(folder, SIDE)
    labels = data.labels
    assert labels is not None

    def spaces() -> dict[str, Space]:
        judge = Judge(folder / "judge_fashion.safetensors", spread(data.images), spread(labels))
        return _with_usual(judge)

    encoder = {"type": "Pixels", "channels": 1}
    kept = folder / "teacher_fashion_32.safetensors"
    return ComposeSet(data.images, labels, data.num_classes, 4, encoder, spaces, teacher_file=kept)


def _latents(folder: Path) -> ComposeSet:
    """Latents of both vendors' emoji; distances are between decoded images."""
    autoencoder = load_autoencoder(folder / "autoencoder")
    images = torch.cat([emoji(folder, vendor, SIDE) for vendor in VENDORS])

    latents, encoder = autoencoder.encode(images), {"type": GivenLatents.__name__}
    spaces, kept = partial(_emoji_spaces, folder), folder / "teacher_latents.safetensors"
    return ComposeSet(latents, None, 0, 1, encoder, spaces, autoencoder.decode, kept)


def _emoji_spaces(folder: Path) -> dict[str, Space]:
    """The classifier has learned subjects from both vendors' emoji."""
    images = [emoji(folder, vendor, SIDE) for vendor in VENDORS]
    labels = torch.arange(len(images[0])) * NUM_SUBJECTS // len(images[0])
    judge = Judge(folder / "judge_emoji.safetensors", torch.cat(images), labels.repeat(len(images)))
    return _with_usual(judge)


def _with_usual(judge: Judge) -> dict[str, Space]:
    network = of_network(EfficientNetLite0(resize=NETWORK_SIDE))
    return {CLASSIFIER: judge, PIXELS: of_images(Pixels(pool=8)), NETWORK: network}


SETS: Mapping[str, Callable[[Path], ComposeSet]] = {
    "emoji_32": _emoji,
    "fashion_32": _fashion,
    "latents": _latents,
}

DATASETS.register_module(name="GivenTensors", module=GivenTensors)
