"""Collects what the metrics need from a set of images, batch by batch, and stores it for a reference set.

Memory for 50,000 images with 2,048 features: covariance 32 MiB, features 400 MB, probabilities of 1,008
classes 200 MB.

Dims: N images, B of them in a batch, D features, S spatial features, K classes.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from speedit_plugins.files import write_whole
from speedit_plugins.trainer.evaluation.distances import FeatureStatistics
from speedit_plugins.trainer.evaluation.features import FeatureExtractor, read

# A covariance of 4096 features takes 128 MiB in float64; common feature spaces have at most 2048.
MAX_FEATURES = 4096
# Rows added to a covariance at once: an update with 16 rows would cost as much as one with 1000.
FLUSH_ROWS = 1000


@dataclass(frozen=True, eq=False)
class FeatureMoments:
    """Mean (D,) and covariance (D, D) of the features of `num_samples` images; None if unknown."""

    mean: Tensor
    covariance: Tensor
    num_samples: int | None


@dataclass(frozen=True, eq=False)
class Collected:
    """Statistics of N images; fields that were not requested are None.

    `gaussian` and `spatial` are moments of the features and of the spatial features. `features` (N, D) and
    `probabilities` (N, K) are float32.
    """

    gaussian: FeatureMoments | None = None
    spatial: FeatureMoments | None = None
    features: Tensor | None = None
    probabilities: Tensor | None = None


GAUSSIANS = ("gaussian", "spatial")
KINDS = (*GAUSSIANS, "features", "probabilities")


def collect(
    batches: Iterable[Tensor], extractor: FeatureExtractor, *, num_samples: int, kinds: Collection[str]
) -> Collected:
    """Computes the statistics of a set of images, or of videos if the extractor takes videos, in one pass.

    Args:
        batches: uint8 (B, ...), with `num_samples` in total; one batch is held at a time.
        extractor: computes the features.
        num_samples: N.
        kinds: the fields of `Collected` to fill.

    Raises:
        ValueError: the extractor cannot compute a field, or has too many features for a covariance.
    """
    sinks: dict[str, _Statistics | _Rows] = {
        kind: _Statistics(extractor.name) if kind in GAUSSIANS else _Rows(num_samples) for kind in kinds
    }
    for images in batches:
        readings = read(extractor, images, spatial="spatial" in kinds, probabilities="probabilities" in kinds)
        for kind, sink in sinks.items():
            values = getattr(readings, "features" if kind == "gaussian" else kind)
            sink.add(values.detach().cpu())
    return Collected(**cast(Any, {kind: sink.result() for kind, sink in sinks.items()}))


def save_collected(path: Path, collected: Collected, *, features: str, fingerprint: str) -> None:
    """Writes a file for `load_collected`, atomically.

    Args:
        path: the file.
        collected: the statistics to store.
        features: identity of the feature extractor.
        fingerprint: fingerprint of the images.

    Raises:
        OSError: the file cannot be written; names it.
    """
    tensors: dict[str, Tensor] = {}
    words = {"features": features, "fingerprint": fingerprint}
    for kind in KINDS:
        value = getattr(collected, kind)
        if isinstance(value, FeatureMoments):
            tensors |= {f"{kind}.mean": value.mean, f"{kind}.covariance": value.covariance}
            words[f"{kind}.num_samples"] = str(value.num_samples)
        elif value is not None:
            tensors[kind] = value
    write_whole(path, save(tensors, metadata=words))


def load_collected(path: Path, *, features: str, fingerprint: str, kinds: Collection[str]) -> Collected:
    """Reads the fields `kinds` from a file of `save_collected`.

    Args:
        path: the file.
        features, fingerprint: the values that the file must have been saved with.
        kinds: the fields of `Collected` to read.

    Raises:
        ValueError: the file is damaged, belongs to other features or images, or lacks a field.
    """
    try:
        with safe_open(path, framework="pt") as file:
            words, tensors = (
                file.metadata() or {},
                {name: file.get_tensor(name) for name in list(file.keys())},
            )
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or not a file of reference statistics: {error}") from error
    wanted = {"features": features, "fingerprint": fingerprint}
    for what, value in wanted.items():
        if words.get(what) != value:
            raise ValueError(
                f"'{path}' has statistics of other {'features' if what == 'features' else 'images'}: {what}"
                f" {words.get(what)!r}, wanted {value!r}; set another reference_statistics or delete the file"
            )
    found: dict[str, Any] = {}
    for kind in kinds:
        if f"{kind}.mean" in tensors:
            count = int(words[f"{kind}.num_samples"])
            found[kind] = FeatureMoments(tensors[f"{kind}.mean"], tensors[f"{kind}.covariance"], count)
        elif kind in tensors:
            found[kind] = tensors[kind]
        else:
            raise ValueError(
                f"'{path}' was written for other metrics and has no {kind}; delete it to compute it again"
            )
    return Collected(**found)


class _Statistics:
    """Accumulates mean and covariance of features, in groups of rows."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._waiting: list[Tensor] = []
        self._statistics: FeatureStatistics | None = None

    def add(self, features: Tensor) -> None:
        dim = features.shape[1]
        if self._statistics is None:
            if dim > MAX_FEATURES:
                raise ValueError(
                    f"features {self._name!r} have {dim} dimensions, wanted at most {MAX_FEATURES}:"
                    f" their covariance would take {8 * dim**2 / 2**30:.0f} GiB; pixels@8 has fewer"
                )
            self._statistics = FeatureStatistics(dim)
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= FLUSH_ROWS:
            self._flush()

    def result(self) -> FeatureMoments:
        self._flush()
        assert self._statistics is not None
        return FeatureMoments(self._statistics.mean, self._statistics.covariance, self._statistics.count)

    def _flush(self) -> None:
        if self._waiting:
            assert self._statistics is not None
            self._statistics.update(torch.cat(self._waiting))
            self._waiting = []


class _Rows:
    """Collects rows of all images into one preallocated tensor, float32 (N, D)."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples, self._filled = num_samples, 0
        self._rows = torch.empty(0)

    def add(self, values: Tensor) -> None:
        if not self._filled:
            self._rows = torch.empty(self._num_samples, values.shape[1])
        self._rows[self._filled : self._filled + len(values)] = values
        self._filled += len(values)

    def result(self) -> Tensor:
        assert self._filled == self._num_samples
        return self._rows
