"""Grids of an inpainting model: fills of the hole in a given sample, or of holes in samples of the dataset.

Dims: B fills, C channels of the sample, F frames (absent for images), H x W pixels. A solid has D x H x W
voxels in place of them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import IMAGE_STREAM, stream_seed
from speedit_plugins.trainer.inputs import masked_latents, with_extra
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.files.sample_files import save_cells
from speedit_plugins.trainer.sampling.files.shape_files import save_models
from speedit_plugins.trainer.sampling.finite import marked
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.inpainting.given_files import read_given
from speedit_plugins.trainer.sampling.inpainting.holes import Holes, fills

# Names of the columns of a grid. Those of images go without.
GIVEN, WITH_HOLE, FILLED = "given", "with its hole", "filled"


def draw_fills(generator: SampleGenerator, conditions: Conditions, path: Path) -> int:
    """Writes a PNG with a row per condition: the sample with its hole, then `samples_per_class` fills.

    Outside of the hole a fill is the given sample, to the bit. For videos and solids see `save_cells`. A
    folder with the name of the grid gets each filled solid as a file too.

    Returns:
        The number of fills.

    Raises:
        ValueError: no sample with a hole can be read, see `read_given`, or no fill is finite. A cross marks
            each of a few.
    """
    config = generator.config
    given = read_given(config, channels=generator.encoder.image_channels)
    sample, mask = (part.to(generator.device) for part in given)
    num_rows, num_fills = max(1, len(conditions.names)), config.samples_per_class
    rows = torch.arange(num_rows).repeat_interleave(num_fills)
    originals = sample.expand(len(rows), *sample.shape[1:])
    # Batches of fills use the streams with smaller numbers.
    seed = stream_seed(config.seed, IMAGE_STREAM, len(rows))
    rest = masked_latents(
        generator.encoder, sample, mask, [torch.Generator(generator.device).manual_seed(seed)]
    )

    def condition_of(some: Tensor) -> Condition:
        return with_extra(conditions.of(some, generator.device), rest.expand(len(some), *rest.shape[1:]))

    drawn = torch.cat([batch.cpu() for batch in generator.draw_batches(condition_of, rows)])
    drawn = marked(drawn, config, generator.source, may_fail=True).to(generator.device)
    filled = torch.where(mask > 0, drawn, originals).cpu()  # (B, C, [F,] H, W)
    shown = with_hole(sample, mask, config).cpu().unsqueeze(0)
    cells = torch.cat(
        [shown.expand(num_rows, *shown.shape[1:]), filled.unflatten(0, (num_rows, num_fills))], dim=1
    )
    save_cells(cells.flatten(0, 1), path, config, columns=1 + num_fills, titles=_titles(config, num_fills))
    if config.voxel_size:
        save_models(filled, path.with_suffix(""), config)
    return len(rows)


def draw_dataset_fills(
    generator: SampleGenerator,
    holes: Holes,
    captions: CaptionSource | None,
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    may_fail: bool = True,
    has_models: bool = False,
) -> int:
    """Writes a PNG with a row for each sample: the sample, its hole, and the fill.

    A cross marks a fill that is not finite. For videos and solids see `save_cells`.

    Args:
        generator: draws the fills.
        holes: the samples.
        captions: see `fills`.
        path: the PNG.
        weights: see `SampleGenerator.draw`.
        may_fail: see `marked`.
        has_models: write each filled solid as a file too, in a folder with the name of the grid.

    Returns:
        The number of fills.

    Raises:
        ValueError: no fill is finite, and `may_fail`.
    """
    parts = list(fills(generator, holes, captions, weights=weights))
    config = generator.config
    given = torch.cat([part.given.samples for part in parts])
    masks = torch.cat([part.given.masks for part in parts])
    filled = torch.cat([part.samples for part in parts])
    filled = marked(filled, config, generator.source, may_fail=may_fail)
    cells = torch.stack([given, with_hole(given, masks, config), filled], dim=1).flatten(0, 1)
    titles = (GIVEN, *_titles(config, 1)) if _titles(config, 1) else ()
    save_cells(cells, path, config, columns=3, titles=titles)
    if config.voxel_size and has_models:
        save_models(filled, path.with_suffix(""), config)
    return len(holes.items)


def with_hole(samples: Tensor, masks: Tensor, config: ExperimentConfig) -> Tensor:
    """Samples (B, C, ...) as they are shown with their holes (B, 1, ...): mid-grey or no voxels there."""
    return torch.where(masks > 0, -1.0 if config.voxel_size else 0.0, samples)


def _titles(config: ExperimentConfig, num_fills: int) -> tuple[str, ...]:
    """Titles of the columns: a sample with its hole, and its fills. Grids of images have none."""
    return (WITH_HOLE, *[FILLED] * num_fills) if config.num_frames or config.voxel_size else ()
