"""Images of the dataset with a hole each, and what an inpainting model fills them with.

Dims: B images, C channels, H x W pixels, N images of the dataset.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from speedit_plugins.files import write_whole
from speedit_plugins.registry import MASKS
from speedit_plugins.registry import build as build_registered
from speedit_plugins.trainer import build
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.latents.cache import LatentCache
from speedit_plugins.trainer.data.loader import HOLE_STREAM, stream_seed
from speedit_plugins.trainer.inputs import masked_latents, with_extra
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.results import CAPTIONS
from speedit_plugins.trainer.sampling.finite import check_all
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.sample_sets import load_item

# The folder with the images that were given, a hole in each.
MASKED = "masked"


@dataclass(frozen=True, eq=False)
class Given:
    """Images (B, C, H, W) in [-1, 1], their masks (B, 1, H, W), 1 in the hole, and labels or captions."""

    items: Tensor
    images: Tensor
    masks: Tensor
    labels: Tensor | None
    captions: list[str]


@dataclass(frozen=True, eq=False)
class Filled:
    """What a model made of `given`: outside of the holes `images` are the given ones, to the bit."""

    given: Given
    images: Tensor


class Holes:
    """Images of the dataset without random flips, a hole in each. Both depend on seed and index alone.

    `items` are their indices in the dataset, int64, evenly spaced.

    Args:
        config: gives the dataset and the masks of `inpainting`.
        num_images: how many; at most the dataset's N.

    Raises:
        ValueError: the dataset has fewer images, cached latents, or images of several sizes.
    """

    def __init__(self, config: ExperimentConfig, *, num_images: int) -> None:
        self._config = config
        self._dataset = build.build_dataset(config, augmented=False)
        if isinstance(self._dataset, LatentCache) or getattr(self._dataset, "buckets", None) is not None:
            raise ValueError(
                "holes are filled in images of one size, got a LatentCache or buckets; wanted a dataset of"
                " images, without buckets"
            )
        self._masks = build_registered(MASKS, cast(dict[str, Any], config.inpainting))
        total = len(self._dataset)
        if num_images > total:
            raise ValueError(
                f"inpainting fills each image of the dataset once: wanted at most its {total} images, got"
                f" {num_images}"
            )
        self.items = torch.arange(num_images) * total // num_images

    def at(self, items: Tensor) -> Given:
        """The images with these indices, int64 (B,), on the CPU."""
        loaded = [load_item(self._config, self._dataset, item) for item in items.tolist()]
        pixels = torch.stack([cast(Tensor, one["image"]) for one in loaded])
        height, width = pixels.shape[2:]
        masks = [self._masks.draw(height, width, self._generator(item, 0)) for item in items.tolist()]
        labels = torch.tensor([one["label"] for one in loaded]) if self._config.num_classes else None
        texts = [str(one["caption"]) for one in loaded] if self._config.text_encoder is not None else []
        return Given(items, pixels, torch.stack(masks).unsqueeze(1), labels, texts)

    def encoder_generators(self, given: Given, device: torch.device) -> list[torch.Generator]:
        """What the encoder draws with for each image, on the device."""
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
    """Fills the holes, those of `per_proc_batch_size` images at a time, on the CPU.

    Each image has its own label or caption.

    Args:
        generator: draws.
        holes: the images.
        captions: encodes captions; needed with a text encoder.
        weights: see `SampleGenerator.draw`.
    """
    start = 0
    for some in holes.items.split(generator.config.per_proc_batch_size):
        given = holes.at(some)
        condition = _condition(generator, holes, given, captions)
        drawn = generator.draw(condition, len(some), weights=weights, stream=start).cpu()
        yield Filled(given, torch.where(given.masks > 0, drawn, given.images))
        start += len(some)


def written_fills(
    generator: SampleGenerator, holes: Holes, captions: CaptionSource | None, folder: Path, bar: Any
) -> Iterator[npt.NDArray[np.uint8]]:
    """Chunks of uint8 fills (B, H, W, C), see `fills`. Each is written to `folder` before it is yielded.

    The images with their holes are written to a folder inside, and the captions at the end.

    Raises:
        ValueError: a fill is not finite.
    """
    (folder / MASKED).mkdir()
    lines: list[str] = []
    done = 0
    for part in fills(generator, holes, captions):
        check_all(part.images, done, generator.config, generator.source)
        filled, given = (images.to_uint8(some) for some in (part.images, part.given.images))
        for i, hole in enumerate((part.given.masks[:, 0] > 0).numpy()):
            name = f"{done + i:06d}.png"
            images.save_png(filled[i], folder / name)
            images.save_with_hole(given[i], hole, folder / MASKED / name)
            if part.given.captions:
                lines.append(json.dumps({"file_name": name, "caption": part.given.captions[i]}))
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
    rest = masked_latents(generator.encoder, given.images.to(device), given.masks.to(device), draws)
    return with_extra(condition, rest)
