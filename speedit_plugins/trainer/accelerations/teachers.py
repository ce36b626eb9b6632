"""The frozen vision networks that an alignment draws a model's tokens to.

Dims: `B` images, `H`, `W` sides in pixels, `Z` width of a feature, `h'`, `w'` sides of the map.
"""

import hashlib
from typing import Protocol

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import FEATURES, FLIPPED_FEATURES
from speedit_plugins.trainer.data.loader import SampleSource
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0
from speedit_plugins.trainer.models.lora import fingerprint
from speedit_plugins.trainer.models.pretrained.vision import VisionNetwork, resized

EMBEDDED = "embedded"
# At this side the embedded network's map has 8 x 8 cells.
EMBEDDED_SIDE = 128
EMBEDDED_WIDTH = 112


class FeatureNetwork(Protocol):
    """Maps images (B, 1 or 3, H, W) in [-1, 1] to a map of features, float32 (B, Z, h', w'); `width` is Z."""

    width: int

    def encode(self, images: Tensor) -> Tensor: ...
    def fingerprint(self) -> str: ...


class EmbeddedNetwork:
    """The embedded EfficientNet-Lite0: the map at 1/16 of the side, of 112 channels.

    Args:
        size: side in pixels to resize to, >= 32.
        device: of the network.

    Raises:
        ValueError: its packages are not installed, or `size` is too small.
    """

    def __init__(self, *, size: int = EMBEDDED_SIDE, device: torch.device) -> None:
        self._network = EfficientNetLite0(resize=size, device=device)
        self.size = size
        self.width = self.encode(torch.zeros(1, 3, size, size, device=device)).shape[1]

    def encode(self, images: Tensor) -> Tensor:
        """See `FeatureNetwork`."""
        return self._network.feature_map((resized(images.float(), self.size) + 1) * 127.5)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the features: the network's name with the size, and its weights."""
        text = f"{self._network.identity} {fingerprint(self._network.state_dict())}"
        return hashlib.sha256(text.encode()).hexdigest()


class Teacher:
    """A network, and whether the training wants its features at this step."""

    def __init__(self, network: FeatureNetwork) -> None:
        self.network, self.width, self.is_wanted = network, network.width, True

    def encode(self, images: Tensor) -> Tensor:
        """See `FeatureNetwork`."""
        return self.network.encode(images)


class CachedTeacher:
    """Stands for a network whose features of every image were stored; keeps no network."""

    def __init__(self, width: int) -> None:
        self.width, self.is_wanted = width, True

    def encode(self, images: Tensor) -> Tensor:
        """Raises ValueError: there are no features of other images."""
        raise ValueError(f"the features come from a cache, got {len(images)} images")


def build_network(
    teacher: str, *, size: int | None, allow_download: bool, device: torch.device
) -> FeatureNetwork:
    """The network that `alignment.teacher` names, on the device.

    Args:
        teacher: `EMBEDDED`, a folder or a hub name.
        size: side in pixels; None is the network's own.
        allow_download: see `VisionNetwork`.
    """
    if teacher == EMBEDDED:
        return EmbeddedNetwork(size=size or EMBEDDED_SIDE, device=device)
    return VisionNetwork(teacher, size=size, allow_download=allow_download).to(device)


def build_teacher(
    config: ExperimentConfig, dataset: SampleSource, device: torch.device
) -> Teacher | CachedTeacher | None:
    """REPA's teacher; None for a config without.

    A dataset with features has the attribute `teacher_fingerprint`, which is compared with the teacher's.

    Raises:
        ValueError: there is no such network, or the features are another network's.
    """
    options = config.alignment
    if options.type != "REPA" or options.teacher is None:
        return None
    network = build_network(
        options.teacher, size=options.teacher_size, allow_download=config.allow_download, device=device
    )
    if not hasattr(dataset, "teacher_fingerprint"):
        return Teacher(network)
    if dataset.teacher_fingerprint != network.fingerprint():
        raise ValueError(
            f"data.dataset: the features in {getattr(dataset, 'folder', 'it')} were made by another"
            f" teacher than alignment.teacher {options.teacher} at this size; wanted that one, or a new cache"
        )
    return CachedTeacher(network.width)


def unread_teacher(config: ExperimentConfig) -> CachedTeacher | None:
    """What stands for REPA's teacher while no file of it is read; None for a config without.

    Its width is 1 if only the teacher's files have it.
    """
    if config.alignment.type != "REPA":
        return None
    return CachedTeacher(EMBEDDED_WIDTH if config.alignment.teacher == EMBEDDED else 1)


def teacher_facts(network: FeatureNetwork | None) -> dict[str, str]:
    """What a cache keeps of the network whose features it has; {} without one."""
    return {} if network is None else {"teacher_fingerprint": network.fingerprint()}


def stored_features(network: FeatureNetwork | None, images: Tensor, *, flip: bool) -> dict[str, Tensor]:
    """What a cache keeps of images (B, C, H, W): maps (B, Z, h', w'), float16; {} without a network.

    Args:
        flip: also the maps of the mirrored images.
    """
    if network is None:
        return {}
    found = {FEATURES: network.encode(images)}
    if flip:
        found[FLIPPED_FEATURES] = network.encode(images.flip(-1))
    return {name: features.to(torch.float16).cpu() for name, features in found.items()}
