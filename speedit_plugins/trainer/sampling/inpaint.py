"""Grids of an inpainting model: fills of the hole in a given image, or of holes in images of the dataset.

Dims: B fills, C channels of the image, H x W pixels.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.images.fit import center_crop
from speedit_plugins.trainer.data.images.pixels import read_rgb
from speedit_plugins.trainer.data.loader import IMAGE_STREAM, stream_seed
from speedit_plugins.trainer.inputs import masked_latents, with_extra
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.finite import marked
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.holes import Holes, fills


def draw_fills(generator: SampleGenerator, conditions: Conditions, path: Path) -> int:
    """Writes a PNG with a row per condition: the image with its hole, then `samples_per_class` fills.

    Outside of the hole a fill is the given image, to the bit.

    Returns:
        The number of fills.

    Raises:
        ValueError: the image or the mask cannot be read, their sizes differ, the mask has no hole, or no fill
            is finite. A cross marks each of a few.
    """
    config = generator.config
    image, mask = (part.to(generator.device) for part in _image_and_mask(config, generator))
    num_rows, num_fills = max(1, len(conditions.names)), config.samples_per_class
    rows = torch.arange(num_rows).repeat_interleave(num_fills)
    originals = image.expand(len(rows), -1, -1, -1)
    # Batches of fills use the streams with smaller numbers.
    seed = stream_seed(config.seed, IMAGE_STREAM, len(rows))
    rest = masked_latents(
        generator.encoder, image, mask, [torch.Generator(generator.device).manual_seed(seed)]
    )

    def condition_of(some: Tensor) -> Condition:
        return with_extra(conditions.of(some, generator.device), rest.expand(len(some), -1, -1, -1))

    drawn = torch.cat([batch.cpu() for batch in generator.draw_batches(condition_of, rows)])
    drawn = marked(drawn, config, generator.source, may_fail=True).to(generator.device)
    fills = torch.where(mask > 0, drawn, originals)  # (B, C, H, W)
    given = image * (1 - mask)
    cells = torch.cat(
        [given.expand(num_rows, 1, -1, -1, -1), fills.unflatten(0, (num_rows, num_fills))], dim=1
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    images.save_grid(cells.flatten(0, 1), path, columns=1 + num_fills)
    return len(rows)


def draw_dataset_fills(
    generator: SampleGenerator,
    holes: Holes,
    captions: CaptionSource | None,
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    may_fail: bool = True,
) -> int:
    """Writes a PNG with a row for each image: the image, its hole, and the fill.

    A cross marks a fill that is not finite.

    Args:
        generator: draws the fills.
        holes: the images.
        captions: see `fills`.
        path: the PNG.
        weights: see `SampleGenerator.draw`.
        may_fail: see `marked`.

    Returns:
        The number of fills.

    Raises:
        ValueError: no fill is finite, and `may_fail`.
    """
    parts = list(fills(generator, holes, captions, weights=weights))
    given = torch.cat([part.given.images for part in parts])
    masks = torch.cat([part.given.masks for part in parts])
    filled = torch.cat([part.images for part in parts])
    filled = marked(filled, generator.config, generator.source, may_fail=may_fail)
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = torch.stack([given, given * (1 - masks), filled], dim=1)
    images.save_grid(cells.flatten(0, 1), path, columns=3)
    return len(holes.items)


def _image_and_mask(config: ExperimentConfig, generator: SampleGenerator) -> tuple[Tensor, Tensor]:
    """The image (1, C, H, W) in [-1, 1] and its mask (1, 1, H, W), 1 in the hole, cropped to image_size."""
    assert config.inpaint_image is not None
    assert config.inpaint_mask is not None
    image, mask = (_read(Path(path)) for path in (config.inpaint_image, config.inpaint_mask))
    if image.size != mask.size:
        raise ValueError(
            f"inpaint_mask needs the size of the image, {image.size[0]} x {image.size[1]}, got"
            f" {mask.size[0]} x {mask.size[1]}"
        )
    edge = config.image_size
    if generator.encoder.image_channels == 1:
        image = image.convert("L")
    pixels = np.asarray(center_crop(image, edge, edge), dtype=np.float32).reshape(edge, edge, -1)
    hole = np.asarray(center_crop(mask.convert("L"), edge, edge)) > 127
    if not hole.any():
        raise ValueError(f"inpaint_mask needs white pixels in the hole, got none in {config.inpaint_mask}")
    scaled = torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1)
    return scaled.unsqueeze(0), torch.from_numpy(hole).float()[None, None]


def _read(path: Path) -> Image.Image:
    if not path.is_file():
        raise ValueError(f"inpainting needs an image file, got {path}, which is none")
    return read_rgb(path)
