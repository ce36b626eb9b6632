"""Image sets for the convergence benchmark, scaled down to a size that trains in minutes.

Dims: N images, C channels, H x W pixels.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from speedit_plugins.trainer.data.images.digits import Digits
from speedit_plugins.trainer.data.images.folder import ImageFolder
from speedit_plugins.trainer.evaluation.npz import npz_keys, read_npz


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images float32 (N, C, H, W) in [-1, 1]; labels int64 (N,) in [0, num_classes), or None."""

    images: Tensor
    labels: Tensor | None
    num_classes: int


def load_image_set(data: str, image_size: int) -> ImageSet:
    """The set that `data` names, as square images with an edge of `image_size` pixels.

    Args:
        data: "digits", the embedded set; an ADM-format .npz, with labels if it has `arr_1`; the images of
            a set in the IDX format of MNIST and Fashion-MNIST, *-images-idx3-ubyte.gz, with its labels beside
            it; or a folder of images, with one folder per class or none.
        image_size: edge in pixels. Images are averaged down to it; only digits are also enlarged.

    Raises:
        ValueError: there is no such data, a file is damaged, or an image is smaller, is not square or has no
            label >= 0.
    """
    if data == "digits":
        digits = Digits(image_size=image_size)
        return ImageSet(digits.images, digits.labels, digits.num_classes)
    path = Path(data)
    if path.is_dir():
        return _read_folder(path, image_size)
    if not path.is_file():
        raise ValueError(f"data needs 'digits', a file or a folder, got {data!r}, which is none")
    images, labels = _read_idx(path) if path.name.endswith("-images-idx3-ubyte.gz") else _read_npz(path)
    if images.shape[1] != images.shape[2] or images.shape[1] < image_size:
        raise ValueError(f"{path} has images {images.shape[1:3]}, wanted squares of at least {image_size}")
    if labels is not None and (labels.shape != (len(images),) or labels.min() < 0):
        got = f"{tuple(labels.shape)}, the least {labels.min()}"
        raise ValueError(f"{path} needs a label >= 0 for each of {len(images)} images, got {got}")
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float()  # (N, C, H, W) in 0..255
    scaled = F.interpolate(values, size=(image_size, image_size), mode="area") / 127.5 - 1
    return ImageSet(scaled, labels, 0 if labels is None else int(labels.max()) + 1)


def spread_labels(labels: Tensor, num_labels: int) -> Tensor:
    """Labels (num_labels,) in the proportions of `labels` (N,), in rising order."""
    places = (torch.arange(num_labels) * 2 + 1) * len(labels) // (2 * num_labels)
    return labels.sort().values[places]


def _read_folder(path: Path, image_size: int) -> ImageSet:
    has_classes = any(entry.is_dir() for entry in path.iterdir())
    folder = ImageFolder(path, image_size=image_size, class_cond=has_classes, random_flip=False)
    # Without flips this generator is never used.
    generator = torch.Generator()
    images = torch.stack([folder.load(index, generator)["image"] for index in range(len(folder))])
    return ImageSet(images, folder.labels if has_classes else None, folder.num_classes if has_classes else 0)


def _read_npz(path: Path) -> tuple[np.ndarray, Tensor | None]:
    images = read_npz(path)
    if "arr_1" not in npz_keys(path):
        return images, None
    with np.load(path, allow_pickle=False) as archive:
        return images, torch.from_numpy(archive["arr_1"].astype(np.int64))


def _read_idx(path: Path) -> tuple[np.ndarray, Tensor]:
    """uint8 images (N, H, W, 1) and labels (N,)."""
    labels = _idx_values(path.with_name(path.name.replace("-images-idx3-", "-labels-idx1-")), 1)
    return _idx_values(path, 3)[..., None], torch.from_numpy(labels.astype(np.int64))


def _idx_values(path: Path, num_dims: int) -> np.ndarray:
    """uint8 values of a compressed IDX file: its kind, `num_dims` sizes as big-endian int32, then bytes."""
    try:
        content = np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8)
        first = 4 + 4 * num_dims
        if tuple(content[:4]) != (0, 0, 8, num_dims):
            raise ValueError(f"it begins with {content[:4].tolist()}, wanted [0, 0, 8, {num_dims}]")
        return content[first:].reshape(*content[4:first].view(">i4")).copy()
    except (ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is no IDX file of bytes: {error}") from error
