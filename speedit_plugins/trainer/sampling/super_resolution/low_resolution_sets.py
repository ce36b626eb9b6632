"""The low-resolution samples that a super-resolution model enlarges: of the data, files, a stage or a caller.

Dims: N samples, B of them at a time, C channels, F frames (absent for images), h x w pixels.
"""

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from speedit_plugins.trainer import build
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.held_out import hold_out
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import AUGMENTATION_STREAM, SampleSource, stream_seed
from speedit_plugins.trainer.low_resolution import LowResolution, build_low_resolution, reduced
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.results import LABELS
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.files.sample_sets import SampleSet, load_item, open_set, read_captions
from speedit_plugins.trainer.sampling.generator import SampleGenerator


class LowResolutionSet(Protocol):
    """N low-resolution samples.

    `originals` are what they were made of; None if that is not known. `versions` are a sample's, the smallest
    first; `at` is the last of them.
    """

    def __len__(self) -> int: ...
    def at(self, rows: Tensor) -> Tensor: ...
    def originals(self, rows: Tensor) -> Tensor | None: ...
    def versions(self, rows: Tensor) -> list[Tensor]: ...


@dataclass(frozen=True, eq=False)
class LowResolutionInputs:
    """What a super-resolution model is given for each of N samples, beside its classes or captions.

    The noise on a sample depends on seed and row alone.

    Args:
        samples: the low-resolution samples.
        maker: makes the model's input of them.
        level: of the noise, see `NoiseAugmentation`.
        seed: of the noise.
    """

    samples: LowResolutionSet
    maker: LowResolution
    level: float
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def of(self, rows: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The entries of the condition for the samples at rows (B,), on the device."""
        seeds = [stream_seed(self.seed, AUGMENTATION_STREAM, row) for row in rows.tolist()]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        level = torch.full((len(rows),), self.level, device=device)
        return self.maker.of(self.samples.at(rows).to(device), level, generators)


class FromData:
    """Samples of the dataset, reduced: evenly spaced, without random flips, those held out where there are.

    Args:
        config: gives the dataset.
        num_samples: how many; at most those that there are.

    Raises:
        ValueError: the dataset has cached latents, or samples of several sizes.
    """

    def __init__(self, config: ExperimentConfig, *, num_samples: int) -> None:
        self._config = config
        whole = build.build_dataset(config, augmented=False)
        if isinstance(whole, LatentCache) or getattr(whole, "buckets", None) is not None:
            raise ValueError(
                "super_resolution samples data of one size, got a LatentCache or buckets; wanted a dataset"
                " of images or videos, without buckets, or low_resolution: an npz or a folder"
            )
        held = config.data.held_out_samples
        self.dataset: SampleSource = hold_out(whole, held, seed=config.seed)[1] if held else whole
        total = len(self.dataset)
        number = min(num_samples, total)
        self.items = torch.arange(number) * total // number

    def __len__(self) -> int:
        return len(self.items)

    def at(self, rows: Tensor) -> Tensor:
        """The low-resolution samples at rows (B,): (B, C, [F,] h, w) in [-1, 1]."""
        return reduced(self.originals(rows), self._config.super_resolution.factor)

    def originals(self, rows: Tensor) -> Tensor:
        """The samples at rows (B,) in full resolution, (B, C, [F,] H, W) in [-1, 1]."""
        return self.loaded(self.items[rows].tolist())

    def loaded(self, items: Sequence[int]) -> Tensor:
        """The samples with these numbers in the data, (B, C, [F,] H, W) in [-1, 1]."""
        name = "video" if self._config.num_frames else "image"
        loaded = [load_item(self._config, self.dataset, item)[name] for item in items]
        return torch.stack([torch.as_tensor(each) for each in loaded])

    def versions(self, rows: Tensor) -> list[Tensor]:
        """The one low-resolution version of the samples at rows (B,)."""
        return [self.at(rows)]

    def item(self, row: int) -> dict[str, Any]:
        """The sample at a row, as the dataset has it."""
        return load_item(self._config, self.dataset, int(self.items[row]))


class FromFiles:
    """Low-resolution samples of an npz or a folder, all of them in memory as uint8.

    Args:
        config: `low_resolution` is the path.
        num_samples: how many; at most those that there are.
        channels: C that the model takes.

    Raises:
        ValueError: there are none, or their shape does not fit the model.
    """

    def __init__(self, config: ExperimentConfig, *, num_samples: int, channels: int) -> None:
        assert config.low_resolution is not None
        found = open_set(config.low_resolution, key="low_resolution")
        self.source: SampleSet = found.in_grey() if channels == 1 else found
        side = config.image_size // config.super_resolution.factor
        frames = (config.num_frames,) if config.num_frames else ()
        wanted, batches, held = (*frames, side, side, channels), [], 0
        for batch in self.source.batches(config.per_proc_batch_size):
            if tuple(batch.shape[1:]) != wanted:
                raise ValueError(
                    f"low_resolution needs samples of {_shape(wanted)}, since image_size is"
                    f" {config.image_size} and super_resolution.factor {config.super_resolution.factor}, got"
                    f" {_shape(batch.shape[1:])} in {config.low_resolution}"
                )
            batches.append(batch)
            held += len(batch)
            if held >= num_samples:
                break
        if not batches:
            raise ValueError(f"low_resolution needs samples, got none in {config.low_resolution}")
        self._pixels = torch.cat(batches)[:num_samples]  # (N, [F,] h, w, C)

    def __len__(self) -> int:
        return len(self._pixels)

    def at(self, rows: Tensor) -> Tensor:
        """See `FromData.at`."""
        return self._pixels[rows].movedim(-1, 1).float() / 127.5 - 1

    def originals(self, rows: Tensor) -> None:
        """None: files have no originals."""

    def versions(self, rows: Tensor) -> list[Tensor]:
        """See `FromData.versions`."""
        return [self.at(rows)]


class FromStage:
    """Samples that a stage draws when they are asked for, those of one batch at a time.

    Args:
        generator: draws them.
        conditions: one for each of the N samples, in their order; the stage's own low-resolution inputs too.
        num_samples: N.
    """

    def __init__(self, generator: SampleGenerator, conditions: Conditions, *, num_samples: int) -> None:
        self.conditions = conditions
        self._generator, self._num_samples = generator, num_samples
        # Of the last call, so that a grid shows what the next stage was given without drawing it again.
        self._last: tuple[list[int], Tensor] | None = None

    def __len__(self) -> int:
        return self._num_samples

    def at(self, rows: Tensor) -> Tensor:
        """The samples at rows (B,), (B, C, [F,] h, w) in [-1, 1], on the CPU. Batches start at other rows.

        Points are in the units of the data.
        """
        if self._last is None or self._last[0] != rows.tolist():
            condition = self.conditions.of(rows, self._generator.device)
            drawn = self._generator.draw(condition, len(rows), stream=int(rows[0]))
            is_bounded = not self._generator.config.num_points
            self._last = rows.tolist(), (drawn.clamp(-1, 1) if is_bounded else drawn).cpu()
        return self._last[1]

    def originals(self, rows: Tensor) -> None:
        """None: what is drawn has no original."""

    def versions(self, rows: Tensor) -> list[Tensor]:
        """What this stage and those before it have drawn, the smallest first."""
        # In this order: the stage draws what those before it keep.
        own = self.at(rows)
        before = self.conditions.inputs
        earlier = before.samples.versions(rows) if isinstance(before, LowResolutionInputs) else []
        return [*earlier, own]

    def generators(self) -> list[SampleGenerator]:
        """Those of the stages before this one, and its own: the smallest first."""
        before = self.conditions.inputs
        if isinstance(before, LowResolutionInputs) and isinstance(before.samples, FromStage):
            return [*before.samples.generators(), self._generator]
        return [self._generator]


class FromCaller:
    """Low-resolution samples (N, C, [F,] h, w) in [-1, 1] that the caller of `load_stages` has."""

    def __init__(self, samples: Tensor) -> None:
        self._samples = samples.float().cpu()

    def __len__(self) -> int:
        return len(self._samples)

    def at(self, rows: Tensor) -> Tensor:
        """The samples at rows (B,)."""
        return self._samples[rows]

    def originals(self, rows: Tensor) -> None:
        """None: their originals are not known."""

    def versions(self, rows: Tensor) -> list[Tensor]:
        """The one version of the samples at rows (B,)."""
        return [self.at(rows)]


def given_conditions(
    config: ExperimentConfig,
    generator: SampleGenerator,
    captions: CaptionSource | None,
    *,
    num_samples: int,
    classes: tuple[str, ...] = (),
) -> Conditions:
    """The low-resolution samples of `low_resolution`, or of the data, each with its own class or caption.

    Args:
        config: of a super-resolution model.
        generator: draws with the model.
        captions: encodes captions; needed with a text encoder.
        num_samples: how many, at most those that there are.
        classes: names of the classes, by number; empty if they are unknown.

    Raises:
        ValueError: see `FromData` and `FromFiles`; or files have no classes or captions, which the model
            needs.
    """
    if config.low_resolution is None:
        data = FromData(config, num_samples=num_samples)
        inputs = inputs_of(data, config, generator)
        about = [data.item(row) for row in range(len(data))] if _is_conditional(config) else []
        labels = [int(item["label"]) for item in about] if config.num_classes else []
        texts = [str(item["caption"]) for item in about] if config.text_encoder is not None else []
    else:
        files = FromFiles(config, num_samples=num_samples, channels=generator.encoder.image_channels)
        inputs = inputs_of(files, config, generator)
        labels = _labels(files.source)[: len(files)] if config.num_classes else []
        has_text = config.text_encoder is not None
        texts = read_captions(files.source, "low_resolution")[: len(files)] if has_text else []
    names = tuple(classes[label] if label < len(classes) else str(label) for label in labels)
    return Conditions(
        names or tuple(texts),
        titles=names if classes else tuple(texts),
        labels=torch.tensor(labels) if config.num_classes else None,
        captions=captions,
        inputs=inputs,
    )


def inputs_of(
    samples: LowResolutionSet, config: ExperimentConfig, generator: SampleGenerator
) -> LowResolutionInputs:
    """What the model of `generator` is given for low-resolution samples, at the level of `sampler`."""
    maker = build_low_resolution(config, generator.encoder)
    assert maker is not None
    level = maker.augmentation.nearest(config.sampler.augmentation)
    return LowResolutionInputs(samples, maker, level, config.seed)


def _is_conditional(config: ExperimentConfig) -> bool:
    return config.num_classes > 0 or config.text_encoder is not None


def _labels(samples: SampleSet) -> list[int]:
    """The label of each sample, from the file that inference wrote beside them.

    Raises:
        ValueError: there is no such file, it is not one of labels, or it lacks a sample.
    """
    folder = None if samples.captions_file is None else samples.captions_file.parent
    path = Path(folder or ".") / LABELS
    if folder is None or not path.is_file():
        raise ValueError(f"low_resolution needs the classes of {samples.source}, got no {path}")
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {posixpath.normpath(row["file_name"]): int(row["label"]) for row in rows}
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(f"{path}: wanted lines with file_name and label, as inference writes them") from None
    names = list(found) if samples.names is None else list(samples.names)
    missing = next((name for name in names if name not in found), None)
    if missing is not None or len(names) != len(samples):
        raise ValueError(f"low_resolution needs a class of each sample, got {len(found)} in {path}")
    return [found[name] for name in names]


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape))
