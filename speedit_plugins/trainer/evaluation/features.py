"""Feature extractors: feature spaces in which sets of images are compared.

The registry FEATURES builds an extractor from its options. If the builder has parameters of these names, it
also gets the reference set, `images` uint8 (N, H, W, C) and `labels` int64 (N,) or None, and the `device` to
run on. An extractor has a `name` and maps uint8 images (B, H, W, C) to float features (B, D). With a method
`read`, as below, it can also serve the sFID and the Inception Score.

Dims: N reference images, B images, H x W pixels, C channels, D features, S spatial features, K classes.
"""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.registry import FEATURES


class FeatureExtractor(Protocol):
    """Maps images to features; metrics are reported with its `name`."""

    name: str

    def __call__(self, images: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Readings:
    """Outputs of a network: features (B, D), spatial features (B, S), class probabilities (B, K)."""

    features: Tensor
    spatial: Tensor | None = None
    probabilities: Tensor | None = None


def read(
    extractor: FeatureExtractor, images: Tensor, *, spatial: bool = False, probabilities: bool = False
) -> Readings:
    """Features of images and, on request, spatial features and class probabilities.

    Raises:
        ValueError: the extractor has no spatial features or no classes.
    """
    if not spatial and not probabilities:
        return Readings(extractor(images))
    reader = getattr(extractor, "read", None)
    found = (
        Readings(extractor(images))
        if reader is None
        else reader(images, spatial=spatial, probabilities=probabilities)
    )
    if spatial and found.spatial is None:
        raise ValueError(
            f"sfid needs an extractor with a spatial map, got {extractor.name}; wanted efficientnet-lite0 or"
            " inception"
        )
    if probabilities and found.probabilities is None:
        raise ValueError(
            f"inception_score needs an extractor with classes, got {extractor.name}; wanted digit_classifier,"
            " efficientnet-lite0 or inception"
        )
    return found


class Pixels:
    """Pixel values in [0, 1], optionally averaged over a grid of pool x pool cells.

    All images must have the shape of the first ones.

    Args:
        pool: cells per side, in [1, min(H, W)]; None keeps every pixel.
    """

    def __init__(self, *, pool: int | None = None) -> None:
        if pool is not None and pool < 1:
            raise ValueError(f"pixels needs pool >= 1, got {pool}")
        self.shape: tuple[int, int, int] | None = None
        self.pool = pool
        self.name = "pixels" if pool is None else f"pixels@{pool}"

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 (B, D) in [0, 1]."""
        if self.shape is None:
            self.shape = _image_shape(images)
        height, width, _ = self.shape
        if self.pool is not None and self.pool > min(height, width):
            raise ValueError(
                f"pixels needs pool in [1, {min(height, width)}] for {height} x {width}, got {self.pool}"
            )
        values = _unit_range(images, self.shape)  # (B, C, H, W)
        if self.pool is not None:
            values = functional.adaptive_avg_pool2d(values, self.pool)
        return values.flatten(start_dim=1)  # (B, D)


def pixels_at_8() -> Pixels:
    """`Pixels` on a grid of 8 x 8 cells: few enough features for small sample sets."""
    return Pixels(pool=8)


class DigitClassifier:
    """The 32 penultimate features of a small convolutional network that is trained on the reference set.

    For small images with few classes, such as digits, for which no pretrained network is suitable. Training
    takes place in the constructor. On one machine, equal arguments give bitwise equal features. The global
    random state is neither used nor changed.

    Args:
        images: uint8 (N, H, W, C), N >= 10; images larger than 8 x 8 are averaged down to it.
        labels: int64 (N,), values 0..K-1 with K >= 2.
        seed: decides the held-out images, the initial weights and the order of training.
        epochs: passes over the training images, >= 1.

    Attributes:
        accuracy: accuracy on the held-out fifth of the reference set.
    """

    name = "digit_classifier"
    dim = 32

    def __init__(self, images: Tensor, labels: Tensor | None, *, seed: int = 0, epochs: int = 15) -> None:
        self.shape = _image_shape(images)
        if labels is None:
            raise ValueError(
                "digit_classifier needs a reference with labels, got none: use the dataset as reference"
                " (reference: null) or other features"
            )
        if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f"digit_classifier needs labels int64 ({len(images)},), "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        if len(images) < 10:
            raise ValueError(f"digit_classifier needs at least 10 images, got {len(images)}")
        if int(labels.min()) < 0 or int(labels.max()) < 1:
            raise ValueError(
                f"digit_classifier needs labels 0..K-1, K >= 2, got {int(labels.min())}..{int(labels.max())}"
            )
        if epochs < 1:
            raise ValueError(f"digit_classifier needs epochs >= 1, got {epochs}")
        generator = torch.Generator().manual_seed(seed)
        held_out, trained_on = held_out_fifth(len(images), generator)
        # Training needs gradients, also if the caller is under no_grad or inference_mode.
        with torch.inference_mode(mode=False), torch.enable_grad():
            self._network = _Network(self.shape[2], self.dim, int(labels.max()) + 1, generator)
            values, targets = self._prepare(images), labels.cpu().clone()
            train_classifier(self._network, values[trained_on], targets[trained_on], epochs, generator)
        # The weights identify the features: another machine or number of threads trains slightly others.
        digest = hashlib.sha256()
        for parameter in self._network.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        self.identity = f"{self.name} {digest.hexdigest()}"
        self.accuracy = float((self.classify(images[held_out]) == targets[held_out]).double().mean())

    def __call__(self, images: Tensor) -> Tensor:
        """Float32 (B, 32)."""
        return self.read(images).features

    @torch.no_grad()
    def read(self, images: Tensor, *, spatial: bool = False, probabilities: bool = False) -> Readings:
        """Features (B, 32) and, on request, probabilities (B, K); there is no spatial map."""
        features: Tensor = self._network.features(self._prepare(images))
        classes = self._network.head(features).softmax(dim=1) if probabilities else None
        return Readings(features, probabilities=classes)

    def classify(self, images: Tensor) -> Tensor:
        """The most likely class of each image, int64 (B,)."""
        probabilities = self.read(images, probabilities=True).probabilities
        assert probabilities is not None
        return probabilities.argmax(dim=1)

    def _prepare(self, images: Tensor) -> Tensor:
        values = _unit_range(images, self.shape).cpu()
        size = (min(8, values.shape[2]), min(8, values.shape[3]))
        return functional.interpolate(functional.adaptive_avg_pool2d(values, size), size=(8, 8)) - 0.5


class _Network(nn.Module):
    """Two convolutions and two linear layers on images (B, C, 8, 8)."""

    def __init__(self, channels: int, width: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        # skip_init: the default initialisation would use the global generator.
        self.features = nn.Sequential(
            nn.utils.skip_init(nn.Conv2d, channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.utils.skip_init(nn.Conv2d, 32, 32, 3, padding=1, stride=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.utils.skip_init(nn.Linear, 32 * 4 * 4, width),
            nn.SiLU(),
        )
        self.head = nn.utils.skip_init(nn.Linear, width, num_classes)
        draw_weights(self, generator)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, 8, 8) to logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(values))
        return logits


def draw_weights(network: nn.Module, generator: torch.Generator) -> None:
    """Draws the weights of a small classifier from its own generator; biases become zero."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, generator=generator)
        else:
            nn.init.zeros_(parameter)


def train_classifier(
    network: nn.Module,
    values: Tensor,
    targets: Tensor,
    epochs: int,
    generator: torch.Generator,
    batch_size: int = 64,
) -> None:
    """Trains a network on values (N, ...) with classes (N,), by cross-entropy and Adam."""
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(epochs):
        for picked in torch.randperm(len(values), generator=generator).split(batch_size):
            loss = functional.cross_entropy(network(values[picked]), targets[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def held_out_fifth(num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of a random fifth of the images, and of the rest."""
    order = torch.randperm(num_images, generator=generator)
    return order[: num_images // 5], order[num_images // 5 :]


def _image_shape(images: Tensor) -> tuple[int, int, int]:
    """(H, W, C) of uint8 images (N, H, W, C)."""
    if images.dtype != torch.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"features need images uint8 (N, H, W, C), not empty; got {images.dtype} {tuple(images.shape)}"
        )
    _, height, width, channels = images.shape
    return height, width, channels


def _unit_range(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Float32 (B, C, H, W) in [0, 1] of uint8 images (B, H, W, C) of the given shape."""
    if _image_shape(images) != shape:
        raise ValueError(f"features need images of one shape, {shape}, got {tuple(images.shape[1:])}")
    return images.permute(0, 3, 1, 2).float() / 255.0


FEATURES.register_module(name="pixels", module=Pixels)
FEATURES.register_module(name="pixels@8", module=pixels_at_8)
FEATURES.register_module(name="digit_classifier", module=DigitClassifier)
