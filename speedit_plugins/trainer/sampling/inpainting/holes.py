"""Samples of the dataset with a hole each, and what an inpainting model fills them with.

Dims: B samples, C channels, F frames (absent for images), H x W pixels, N samples of the dataset. A solid has
D x H x W voxels in place of them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import build
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.holes import draw_hole, hole_key
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import HOLE_STREAM, stream_seed
from speedit_plugins.trainer.inputs import masked_latents, with_extra
from speedit_plugins.trainer.layouts import plural
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.results import CAPTIONS, MASKED
from speedit_plugins.trainer.sampling.files.sample_files import save_known, save_sample, saved_form, suffix_of
from speedit_plugins.trainer.sampling.files.sample_sets import load_item
from speedit_plugins.trainer.sampling.finite import check_all
from speedit_plugins.trainer.sampling.generator import SampleGenerator


@dataclass(frozen=True, eq=False)
class Given:
    """Samples (B, C, [F,] H, W) in [-1, 1], masks (B, 1, [F,] H, W), 1 in holes, labels or captions."""

    items: Tensor
    samples: Tensor
    masks: Tensor
    labels: Tensor | None
    captions: list[str]


@dataclass(frozen=True, eq=False)
class Filled:
    """What a model made of `given`: outside of the holes `samples` are the given ones, to the bit."""

    given: Given
    samples: Tensor


class Holes:
    """Samples of the dataset without random flips, a hole in each. Both depend on seed and index alone.

    `items` are their indices in the dataset, int64, evenly spaced.

    Args:
        config: gives the dataset and the masks of `inpainting`.
        num_samples: how many; at most the dataset's N.

    Raises:
        ValueError: the dataset has fewer samples, cached latents, or samples of several sizes.
    """

    def __init__(self, config: ExperimentConfig, *, num_samples: int) -> None:
        self._config, what = config, plural(config)
        self._dataset = build.build_dataset(config, augmented=False)
        if isinstance(self._dataset, LatentCache) or getattr(self._dataset, "buckets", None) is not None:
            raise ValueError(
                f"holes are filled in {what} of one size, got a LatentCache or buckets; wanted a dataset of"
                f" {what}, without buckets"
            )
        self._masks = build.build_masks(config)
        total = len(self._dataset)
        if num_samples > total:
            raise ValueError(
                f"inpainting fills each {what[:-1]} of the dataset once: wanted at most its {total} {what},"
                f" got {num_samples}"
            )
        self.items = torch.arange(num_samples) * total // num_samples

    def at(self, items: Tensor) -> Given:
        """The samples with these indices, int64 (B,), on the CPU."""
        loaded = [load_item(self._config, self._dataset, item) for item in items.tolist()]
        key = hole_key(loaded[0])
        samples = torch.stack([cast(Tensor, one[key]) for one in loaded])
        masks = [
            draw_hole(self._masks, key, samples.shape[2:], self._generator(item, 0))
            for item in items.tolist()
        ]
        labels = torch.tensor([one["label"] for one in loaded]) if self._config.num_classes else None
        texts = [str(one["caption"]) for one in loaded] if self._config.text_encoder is not None else []
        return Given(items, samples, torch.stack(masks).unsqueeze(1), labels, texts)

    def encoder_generators(self, given: Given, device: torch.device) -> list[torch.Generator]:
        """What the encoder draws with for each sample, on the device."""
        return [self._generator(item, 1, device) for item in given.items.tolist()]

    def _generator(self, item: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
        seed = stream_seed(self._config.seed, HOLE_STREAM, item, number)
        return torch.Generator(device).manual_seed(seed)


def fills(
    generator: SampleGenerator,
    holes: Holes,
    captions: CaptionSource | None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> Iterator[Filled]:
    """Fills the holes, those of `per_proc_batch_size` samples at a time, on the CPU.

    Each sample has its own label or caption.

    Args:
        generator: draws.
        holes: the samples.
        captions: encodes captions; needed with a text encoder.
        weights: see `SampleGenerator.draw`.
    """
    start = 0
    for some in holes.items.split(generator.config.per_proc_batch_size):
        given = holes.at(some)
        condition = _condition(generator, holes, given, captions)
        drawn = generator.draw(condition, len(some), weights=weights, stream=start).cpu()
        yield Filled(given, torch.where(given.masks > 0, drawn, given.samples))
        start += len(some)


def written_fills(
    generator: SampleGenerator, holes: Holes, captions: CaptionSource | None, folder: Path, bar: Any
) -> Iterator[Any]:
    """Chunks of fills in their saved form, see `fills`. Each is written to `folder` before it is yielded.

    What was given is written to a folder inside, see `save_known`, and the captions at the end.

    Raises:
        ValueError: a fill is not finite.
    """
    config = generator.config
    (folder / MASKED).mkdir()
    lines: list[str] = []
    done = 0
    for part in fills(generator, holes, captions):
        check_all(part.samples, done, config, generator.source)
        filled, given = (saved_form(some, config) for some in (part.samples, part.given.samples))
        for i, hole in enumerate(part.given.masks[:, 0] > 0):
            stem = f"{done + i:06d}"
            save_sample(filled[i], folder / stem, config)
            save_known(given[i], hole, folder / MASKED / stem, config)
            if part.given.captions:
                about = {"file_name": f"{stem}{suffix_of(config)}", "caption": part.given.captions[i]}
                lines.append(json.dumps(about))
        done += len(filled)
        bar.update(len(filled))
        yield filled
    if lines:
        write_whole(folder / CAPTIONS, "".join(f"{line}\n" for line in lines).encode())


def _condition(
    generator: SampleGenerator, holes: Holes, given: Given, captions: CaptionSource | None
) -> Condition:
    device = generator.device
    condition: Condition = None if given.labels is None else given.labels.to(device)
    if given.captions:
        assert captions is not None
        condition = {name: value.to(device) for name, value in captions.encode(given.captions).items()}
    draws = holes.encoder_generators(given, device)
    rest = masked_latents(generator.encoder, given.samples.to(device), given.masks.to(device), draws)
    return with_extra(condition, rest)
