"""Which sides and numbers of frames fit a model and its encoder, found before anything is trained.

Dims: F frames, H x W pixels.
"""

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from speedit_plugins.registry import MODELS


def stated_patch(section: Mapping[str, Any]) -> int:
    """Side of a patch that the section of a model states, or that its type has; 1 if only a file says so."""
    name = str(section["type"])
    named = re.fullmatch(r".*/(\d+)", name)
    if named is not None:
        return int(named[1])
    builder = MODELS.get(name)
    if section.get("path") is not None or builder is None:
        return 1
    parameter = inspect.signature(builder).parameters.get("patch_size")
    stated = section.get("patch_size", None if parameter is None else parameter.default)
    return stated if isinstance(stated, int) and stated > 0 else 1


def check_sides(places: Mapping[str, Sequence[int]], *, downsample: int, patch: int) -> None:
    """Nothing, if every side in pixels is a multiple of the encoder's downsampling times the model's patch.

    Args:
        places: sides (H, W), or (F, H, W), by the key of the config that has them.
        downsample: pixels of an image for each cell of its latent, on a side.
        patch: cells of the latent for each patch, on a side.

    Raises:
        ValueError: a side is none; the message has its key, and the nearest sides that are.
    """
    unit = downsample * patch
    for key, shape in places.items():
        for side in shape[-2:]:
            if side % unit:
                nearest = [n for n in (side // unit * unit, (side // unit + 1) * unit) if n]
                raise ValueError(
                    f"{key} needs sides that are multiples of {unit}, the encoder's {downsample} times the"
                    f" model's patch of {patch}, got {side}; nearest: {' or '.join(map(str, nearest))}"
                )


def check_factor(places: Mapping[str, Sequence[int]], factor: int) -> None:
    """Nothing, if every side in pixels is a multiple of the factor of a super-resolution; 0 is none.

    Args:
        places: as in `check_sides`.
        factor: how many times smaller the low-resolution sides are.

    Raises:
        ValueError: a side is none; the message has its key.
    """
    for key, shape in places.items():
        for side in shape[-2:] if factor else ():
            if side % factor:
                raise ValueError(
                    f"{key} needs sides that are multiples of super_resolution.factor {factor}, got {side}"
                )


def check_frames(places: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Nothing, if a video model takes the frames of every shape (F, H, W).

    Args:
        places: as in `check_sides`; sides without F have no frames.
        model: with `taken_frames`, the numbers of frames that it takes; any other takes all.

    Raises:
        ValueError: it does not; the message has the key, and what the model takes.
    """
    taken: Collection[int] | None = getattr(model, "taken_frames", None)
    for key, shape in places.items():
        if taken is not None and len(shape) > 2 and shape[0] not in taken:
            wanted = f"1 to {max(taken)}" if len(taken) > 2 else " or ".join(map(str, taken))
            raise ValueError(f"{key} needs {wanted} frames, the model's num_frames, got {shape[0]}")


def check_one_size(places: Mapping[str, Sequence[int]], model: nn.Module, *, downsample: int) -> None:
    """Nothing, if the model takes inputs of several sizes, or every place has its own.

    Args:
        places: as in `check_sides`.
        model: with `is_of_one_size` true, it takes squares of `input_size` alone.
        downsample: as in `check_sides`.

    Raises:
        ValueError: a side is another; the message has its key, and the side that fits.
    """
    if not getattr(model, "is_of_one_size", False):
        return
    edge = int(getattr(model, "input_size", 0)) * downsample
    for key, shape in places.items():
        if tuple(shape[-2:]) != (edge, edge):
            got = " x ".join(map(str, shape[-2:]))
            raise ValueError(
                f"{key} needs {edge} x {edge}, got {got}: this {type(model).__name__} takes one size"
            )


def shapes_of(image_size: int, buckets: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """The shapes that a config states, by key: `image_size` and each of the buckets.

    Args:
        image_size: side of the square.
        buckets: those of each dataset, by their key, such as `data.dataset.buckets`. What is no list of lists
            of ints is left to the dataset, which says what is wrong with it.
    """
    found: dict[str, Sequence[int]] = {"image_size": (image_size, image_size)}
    for key, listed in buckets.items():
        for number, bucket in enumerate(listed if isinstance(listed, Sequence) else ()):
            is_shape = isinstance(bucket, Sequence) and all(type(side) is int and side > 0 for side in bucket)
            if is_shape and len(bucket) in (2, 3):
                found[f"{key}[{number}] {list(bucket)}"] = bucket
    return found
