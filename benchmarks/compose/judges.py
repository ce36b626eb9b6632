"""A small classifier whose features judge the samples of benchmarks/compose. No training sees it.

Dims: N images, C channels, H x W pixels, D features.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.files import replacing
from speedit_plugins.trainer.logging.images import to_uint8

NUM_FEATURES = 64


class Judge:
    """The 64 penultimate features of a convolutional network, trained to name the class of an image.

    It sees all pixels, where `DigitClassifier` sees 8 x 8. It is trained once and kept in a file.
    The global random state is neither used nor changed.

    Args:
        file: weights are read from it, or written to it, in safetensors form.
        images: float32 (N, C, H, W) in [-1, 1], H and W multiples of 8.
        labels: int64 (N,) from 0 on.
        seed: decides the weights and the order of training.
        epochs: passes over the images.

    Attributes:
        accuracy: on every tenth image; the network is trained on the others.

    Raises:
        ValueError: the file has other weights.
    """

    def __init__(
        self, file: Path, images: Tensor, labels: Tensor, *, seed: int = 0, epochs: int = 12
    ) -> None:
        is_held_out = torch.arange(len(images)) % 10 == 9
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            self._network = _network(images.shape[1], images.shape[2], int(labels.max()) + 1)
            if not file.exists():
                _train(self._network, images[~is_held_out], labels[~is_held_out], epochs)
                with replacing(file) as partial:
                    save_file(self._network.state_dict(), partial)
        # What was written counts in every run, also where two of them trained it.
        try:
            self._network.load_state_dict(load_file(file))
        except RuntimeError as error:
            raise ValueError(f"{file} has other weights than this judge; delete it: {error}") from error
        self._network.requires_grad_(requires_grad=False)
        guesses = self._network[-1](self(images[is_held_out])).argmax(dim=1)
        self.accuracy = float((guesses == labels[is_held_out]).double().mean())

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Tensor:
        """Features (N, 64) of samples (N, C, H, W), rounded to the 256 levels of an image."""
        images = torch.from_numpy(to_uint8(samples)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.cat([self._network[:-1](part) for part in images.split(250)])


def _network(channels: int, side: int, num_classes: int) -> nn.Sequential:
    widths = (channels, 32, 64, 64)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
    layers += [nn.Flatten(), nn.Linear(widths[-1] * (side // 8) ** 2, NUM_FEATURES), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(NUM_FEATURES, num_classes))


def _train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int, batch_size: int = 64) -> None:
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            optimizer.zero_grad()
            functional.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
