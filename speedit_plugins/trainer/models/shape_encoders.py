"""Encoders of shapes that change nothing: the model is trained on the voxels, or the points, themselves.

Dims: `B` batch, `C` channels, `D`, `H`, `W` sides in voxels, `N` points.
"""

import hashlib
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from speedit_plugins.registry import ENCODERS


class _Identity(nn.Module):
    """Gives back what it gets, after a look at its shape."""

    downsample = 1
    layout: ClassVar[str]
    """Key of the samples in a batch. It says what their axes mean."""
    axes: ClassVar[str]
    """The axes after batch and channels, for messages."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = self.image_channels = channels

    def encode(self, shapes: Tensor, generators: Any = None) -> Tensor:
        """Returns the shapes (B, channels, ...) as they are, without a random draw."""
        return self._checked(shapes)

    def posterior(self, shapes: Tensor) -> tuple[Tensor, Tensor]:
        """The shapes as the mean, with a standard deviation of 0."""
        return self._checked(shapes), torch.zeros_like(shapes)

    def fingerprint(self) -> str:
        """Sha256 in hexadecimal of all that decides the latents: class name and channels."""
        return hashlib.sha256(f"{type(self).__name__} {self.channels}".encode()).hexdigest()

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the latents (B, channels, ...) as they are."""
        return self._checked(latents)

    def _checked(self, shapes: Tensor) -> Tensor:
        rank = 2 + len(self.axes.split(", "))
        if shapes.ndim != rank or shapes.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} got shapes of shape {tuple(shapes.shape)}, wanted"
                f" (B, {self.channels}, {self.axes})"
            )
        return shapes


class Voxels(_Identity):
    """Solids of voxels (B, C, D, H, W) in [-1, 1], as they are.

    Args:
        channels: C.
    """

    layout = "voxels"
    axes = "D, H, W"

    def __init__(self, channels: int = 1) -> None:
        if channels < 1:
            raise ValueError(f"Voxels needs channels >= 1, got {channels}")
        super().__init__(channels)


class Points(_Identity):
    """Point clouds (B, C, N), as they are.

    Args:
        channels: C. The first three are coordinates.
    """

    layout = "points"
    axes = "N"

    def __init__(self, channels: int = 3) -> None:
        if channels < 3:
            raise ValueError(f"Points needs channels >= 3, the coordinates of a point, got {channels}")
        super().__init__(channels)


ENCODERS.register_module(name="Voxels", module=Voxels)
ENCODERS.register_module(name="Points", module=Points)
