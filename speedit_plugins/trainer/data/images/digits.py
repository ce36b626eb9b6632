"""A small dataset of real handwritten digits that needs no download.

Dims: N images, C channels, H x W pixels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.registry import DATASETS
from speedit_plugins.trainer.data.identity import identify

IMAGE_SIZES = (8, 16, 32)


class Digits:
    """1,797 grey images of handwritten digits, 8 x 8 pixels, ten classes.

    Source: scikit-learn's `load_digits`, the test part of the UCI set "Optical Recognition of Handwritten
    Digits" (Alpaydin and Kaynak 1998). Its grey levels 0..16 are mapped to [-1, 1].

    Args:
        image_size: 8; 16 and 32 are enlarged by bilinear interpolation.
    """

    num_classes = 10
    channels = 1

    def __init__(self, *, image_size: int = 8) -> None:
        if image_size not in IMAGE_SIZES:
            raise ValueError(f"Digits needs image_size in {IMAGE_SIZES}, got {image_size}")
        self.image_size = image_size
        grey, self.labels = _read_digits()  # (N, 1, 8, 8), (N,)
        if image_size != grey.shape[-1]:
            grey = functional.interpolate(
                grey, size=(image_size, image_size), mode="bilinear", align_corners=False
            )
        self.images = grey / 8.0 - 1.0  # (N, 1, H, W) in [-1, 1]

    def __len__(self) -> int:
        return len(self.images)

    def identity(self) -> dict[str, str]:
        """A constant: the digits come with their package."""
        return identify(contents=["Digits"])

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        """One sample: "image" float32 (1, H, W) in [-1, 1] and "label" int in [0, 10).

        `generator` is not used: a mirrored digit is no longer that digit, so there is no augmentation.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Digits has {len(self)} images, got index {index}")
        # A copy, so that a caller who modifies the sample does not change the dataset.
        return {"image": self.images[index].clone(), "label": int(self.labels[index])}


def _read_digits() -> tuple[Tensor, Tensor]:
    """Grey levels in [0, 16], float32 (N, 1, 8, 8), and labels int64 (N,)."""
    # Imported here because scikit-learn is optional and takes a second to load.
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = "Digits needs scikit-learn: pip install 'speedit-plugins[trainer]'"
        raise ImportError(message) from error
    bunch = load_digits()
    grey = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1)
    return grey, torch.as_tensor(bunch.target, dtype=torch.int64)


DATASETS.register_module(name="Digits", module=Digits)
