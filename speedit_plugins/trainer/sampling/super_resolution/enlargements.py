"""Grids of a super-resolution model: a row for each sample, from its low resolution to the original.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.sampling.conditions import Conditions
from speedit_plugins.trainer.sampling.files.sample_files import save_cells
from speedit_plugins.trainer.sampling.finite import marked
from speedit_plugins.trainer.sampling.generator import SampleGenerator
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import LowResolutionInputs


def draw_enlargements(
    generator: SampleGenerator,
    conditions: Conditions,
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
    may_fail: bool = True,
) -> int:
    """Writes a PNG with a row for each low-resolution sample: itself, what was drawn, and the original.

    The original is there where it is known. In a cascade there is a column for each stage. For videos see
    `images.save_videos`.

    Args:
        generator: draws.
        conditions: with `LowResolutionInputs`.
        path: the PNG.
        weights, callback: see `SampleGenerator.draw`.
        may_fail: see `marked`.

    Returns:
        The number of samples that were drawn.

    Raises:
        ValueError: no sample is finite, and `may_fail`. A cross marks each of a few.
    """
    inputs, config = conditions.inputs, generator.config
    assert isinstance(inputs, LowResolutionInputs)
    rows = torch.arange(len(inputs))
    drawn, earlier, originals = [], [], []
    batches = generator.draw_batches(
        lambda some: conditions.of(some, generator.device), rows, weights=weights, callback=callback
    )
    for some, batch in zip(rows.split(config.per_proc_batch_size), batches, strict=True):
        drawn.append(batch.cpu())
        earlier.append(inputs.samples.versions(some))
        originals.append(inputs.samples.originals(some))
    columns = [torch.cat(parts) for parts in zip(*earlier, strict=True)]
    columns.append(marked(torch.cat(drawn), config, generator.source, may_fail=may_fail))
    titles = [f"{column.shape[-2]} x {column.shape[-1]}" for column in columns]
    known = [part for part in originals if part is not None]
    if known:
        columns.append(torch.cat(known))
        titles.append("original")
    columns = [blocks(column, config.image_size // column.shape[-1]) for column in columns]
    save_columns(columns, path, config, titles=titles, row_titles=conditions.names)
    return len(rows)


def save_columns(
    columns: list[Tensor],
    path: Path,
    config: ExperimentConfig,
    *,
    titles: Sequence[str],
    row_titles: Sequence[str],
) -> None:
    """Writes a grid with a row for each sample; each column has (B, C, [F,] H, W), under its title."""
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    save_cells(cells, path, config, columns=len(columns), titles=titles, row_titles=row_titles)


def blocks(samples: Tensor, factor: int) -> Tensor:
    """Samples (B, C, [F,] h, w) enlarged by a factor, each pixel as a square."""
    return samples.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)
