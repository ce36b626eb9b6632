"""The features of REPA's embedded teacher for a data set, made once and kept in a file.

A training on stored latents has them stored as well (`tools/cache_latents.py --teacher`), so that a step
does not pay for the teacher.

Dims: `N` images, `Z` width of a feature, `h'`, `w'` sides of the map.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from speedit_plugins.trainer.accelerations.teachers import EmbeddedNetwork

NAME, FINGERPRINT = "features", "teacher_fingerprint"
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class TeacherFeatures:
    """Maps of all images, float16 (N, Z, h', w'), and the fingerprint of the teacher that made them."""

    maps: Tensor
    fingerprint: str


def teacher_features(path: Path, images: Tensor, decode: Callable[[Tensor], Tensor]) -> TeacherFeatures:
    """The features in the file, which is written first if it is missing or of another teacher.

    Args:
        path: a .safetensors file.
        images: what is trained on, (N, C, H, W).
        decode: from that to images in [-1, 1].
    """
    network = EmbeddedNetwork(device=torch.device("cpu"))
    fingerprint = network.fingerprint()
    if not _has(path, fingerprint, len(images)):
        with torch.no_grad():
            maps = [network.encode(decode(part)).half() for part in images.split(BATCH_SIZE)]
        partial = path.with_suffix(".partial")
        save_file({NAME: torch.cat(maps).contiguous()}, partial, {FINGERPRINT: fingerprint})
        partial.replace(path)
    with safe_open(path, framework="pt") as file:
        return TeacherFeatures(file.get_tensor(NAME), fingerprint)


def _has(path: Path, fingerprint: str, num_images: int) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, framework="pt") as file:
        is_same = (file.metadata() or {}).get(FINGERPRINT) == fingerprint
        return is_same and file.get_slice(NAME).get_shape()[0] == num_images
