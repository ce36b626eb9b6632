"""The data sets of benchmarks/flow: images, latents and feature maps, with a model and spaces for each.

They are read from a folder that is no part of the repository:

    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist*.deb DIR
    npm pack emoji-datasource-twitter@16.0.0 emoji-datasource-google@16.0.0 emojibase-data@16.0.3
    python tools/build_emoji.py --vendor google --images emoji-datasource-google-16.0.0.tgz --side 32 \\
        --names emojibase-data-16.0.3.tgz --output DIR/emoji_google_32.npz     (and the same for twitter)
    python -m benchmarks.flow.small_autoencoder --data-dir DIR

Dims: N samples, C channels, H x W pixels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.flow.small_autoencoder import load_autoencoder
from benchmarks.flow.spaces import NETWORK_SIDE as SIDE
from benchmarks.flow.spaces import Space, directions, feature_maps, features_after, of_images, of_network
from benchmarks.image_sets import ImageSet, load_image_set
from benchmarks.stacked.fine_tuning import Start
from benchmarks.stacked.training import Shape
from speedit_plugins.registry import nearest
from speedit_plugins.trainer.evaluation.features import DigitClassifier, Pixels
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0
from speedit_plugins.trainer.logging.images import to_uint8

FASHION = "train-images-idx3-ubyte.gz"
VENDORS = ("twitter", "google")
# Enough to know 64 features well; more would take minutes.
NUM_REFERENCE = 4000


@dataclass(frozen=True, eq=False)
class FlowSet:
    """What members of one data set share.

    Args:
        data: what the model is trained on; `images` may be latents, near unit variance.
        spaces: name -> feature space of the distances. All count when a law is chosen.
        shape: shape of a member.
        horizon: steps of a training.
        is_clamped: samples are pixels, so x_0 may be clamped to [-1, 1].
        start: where a fine-tuning starts; None is a training from the beginning.
    """

    data: ImageSet
    spaces: Mapping[str, Space]
    shape: Shape
    horizon: int
    is_clamped: bool
    start: Start | None = None

    @property
    def reference(self) -> Tensor:
        """Samples of the data, evenly spread, at most twice `NUM_REFERENCE`."""
        return _spread(self.data.images)


def load_flow_set(name: str, folder: Path) -> FlowSet:
    """A data set by name; ValueError for an unknown name or files that are not there."""
    if name not in SETS:
        raise ValueError(f"unknown data set {name!r}{nearest(name, SETS)}; known: {', '.join(SETS)}")
    return SETS[name](folder)


def emoji(folder: Path, vendor: str, side: int) -> Tensor:
    """Emoji (1911, 3, side, side) in [-1, 1]."""
    path = _needed(folder, f"emoji_{vendor}_32.npz")
    with np.load(path, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"]).permute(0, 3, 1, 2).float()
    return F.interpolate(images, size=(side, side), mode="area") / 127.5 - 1


def fashion(folder: Path, side: int) -> ImageSet:
    """Fashion-MNIST, 60,000 grey images. At 32 pixels it has a black frame of two around its 28."""
    path = _needed(folder, FASHION)
    if side != 32:
        return load_image_set(str(path), side)
    data = load_image_set(str(path), 28)
    return ImageSet(F.pad(data.images, (2, 2, 2, 2), value=-1.0), data.labels, data.num_classes)


def _digits(_: Path) -> FlowSet:
    data = load_image_set("digits", 8)
    return FlowSet(data, {"classifier": _classifier(data)}, Shape(), 1600, is_clamped=True)


def _fashion(folder: Path, *, side: int) -> FlowSet:
    data = fashion(folder, side)
    spaces = {"network": of_network(EfficientNetLite0(resize=SIDE)), "classifier": _classifier(data)}
    return FlowSet(data, spaces, _shape(side), 800, is_clamped=True)


def _emoji(folder: Path, *, vendor: str, side: int) -> FlowSet:
    data = ImageSet(emoji(folder, vendor, side), None, 0)
    spaces = {"network": of_network(EfficientNetLite0(resize=SIDE)), "pixels@8": of_images(Pixels(pool=8))}
    return FlowSet(data, spaces, _shape(side), 800, is_clamped=True)


def _latents(folder: Path) -> FlowSet:
    """Latents of both vendors' emoji; distances are between decoded images."""
    autoencoder = load_autoencoder(_needed(folder, "autoencoder"))
    images = torch.cat([emoji(folder, vendor, 32) for vendor in VENDORS])
    data = ImageSet(autoencoder.encode(images), None, 0)
    network = of_network(EfficientNetLite0(resize=SIDE))
    pixels = of_images(Pixels(pool=8))
    spaces = {
        "network": lambda latents: network(autoencoder.decode(latents)),
        "pixels@8": lambda latents: pixels(autoencoder.decode(latents)),
    }
    return FlowSet(data, spaces, Shape(width=96, depth=3, patch_size=2), 800, is_clamped=False)


def _feature_maps(folder: Path) -> FlowSet:
    """Maps 80 x 4 x 4 from inside the ImageNet network, of Fashion-MNIST.

    Distances are between the network's last features, computed from the maps: its later layers saw no
    training of a flow, and weigh the map's channels by what they mean for an image.
    """
    shown = fashion(folder, 32)
    # As many as the emoji have, and quick to compute.
    rows = torch.arange(0, len(shown.images), 5)
    network = EfficientNetLite0(resize=SIDE)
    parts = shown.images[rows].split(500)
    size = (SIDE, SIDE)
    maps = torch.cat([feature_maps(network, F.interpolate(x, size, mode="bilinear")) for x in parts])
    mean, std = maps.mean(dim=(0, 2, 3), keepdim=True), maps.std(dim=(0, 2, 3), keepdim=True)
    labels = None if shown.labels is None else shown.labels[rows]
    data = ImageSet((maps - mean) / std, labels, shown.num_classes)

    def after(samples: Tensor) -> Tensor:
        return torch.cat([features_after(network, part * std + mean) for part in samples.split(500)])

    spaces = {
        "later layers": lambda samples: after(samples) @ directions(1280),
        "pooled": lambda samples: samples.mean(dim=(2, 3)),
    }
    shape = Shape(width=128, depth=3, patch_size=1)
    return FlowSet(data, spaces, shape, 800, is_clamped=False)


def _fine_tuning(folder: Path, *, rank: int) -> FlowSet:
    """Fashion-MNIST at 16 pixels: a model of classes 0 to 4 goes on with classes 5 to 9."""
    whole = fashion(folder, 16)
    assert whole.labels is not None
    first, later = (
        ImageSet(whole.images[rows], whole.labels[rows], whole.num_classes)
        for rows in (whole.labels < 5, whole.labels >= 5)
    )
    start = Start(first, 1200, rank, folder, "fashion_16_of_5")
    spaces = {"network": of_network(EfficientNetLite0(resize=SIDE)), "classifier": _classifier(whole)}
    return FlowSet(later, spaces, _shape(16), 300, is_clamped=True, start=start)


def _classifier(data: ImageSet) -> Space:
    assert data.labels is not None
    images = torch.from_numpy(to_uint8(_spread(data.images)))
    return of_images(DigitClassifier(images, _spread(data.labels)))


def _spread(values: Tensor) -> Tensor:
    return values[:: max(1, len(values) // NUM_REFERENCE)]


def _shape(side: int) -> Shape:
    # As many tokens at every size: 4 x 4, and 8 x 8 at 32 pixels would take four times as long.
    return Shape(width=96, depth=3, patch_size=max(2, side // 4))


def _needed(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.exists():
        raise ValueError(
            f"--data-dir needs {name}, got {folder}; benchmarks/flow/sets.py says how to make it"
        )
    return path


SETS: Mapping[str, Callable[[Path], FlowSet]] = {
    "digits_8": _digits,
    **{f"fashion_{side}": partial(_fashion, side=side) for side in (8, 16, 32)},
    **{
        f"emoji_{vendor}_{side}": partial(_emoji, vendor=vendor, side=side)
        for vendor in VENDORS
        for side in (8, 16, 32)
    },
    "latents": _latents,
    "feature_maps": _feature_maps,
    "fashion_16_tuned": partial(_fine_tuning, rank=0),
    "fashion_16_lora": partial(_fine_tuning, rank=4),
}
