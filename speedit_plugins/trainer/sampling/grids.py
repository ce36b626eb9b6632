"""The phase sample: a grid of images, videos or shapes from a trained model.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer import checkpoints, results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.sampling.conditions import Conditions, grid_conditions
from speedit_plugins.trainer.sampling.files.sample_files import save_cells
from speedit_plugins.trainer.sampling.files.shape_files import save_models
from speedit_plugins.trainer.sampling.finite import marked
from speedit_plugins.trainer.sampling.generator import SampleGenerator, load_generator
from speedit_plugins.trainer.sampling.inpainting.holes import Holes
from speedit_plugins.trainer.sampling.inpainting.inpaint import draw_dataset_fills, draw_fills
from speedit_plugins.trainer.sampling.super_resolution.cascade import cascade_conditions, stages_of
from speedit_plugins.trainer.sampling.super_resolution.enlargements import draw_enlargements
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import given_conditions
from speedit_plugins.trainer.terminal import progress, say


def sample(config: ExperimentConfig) -> int:
    """Writes the sample grid: a column per class or prompt, `samples_per_class` rows. Returns 0."""
    folder = Path(config.experiment_dir)
    # Before any weights are read.
    stages_of(config)
    generator, captions, source = load_generator(config)
    classes = checkpoints.class_names(source)
    path = results.free_path(folder / results.SAMPLES)
    if config.inpainting is not None and config.inpaint_image is not None:
        num_samples = draw_fills(generator, grid_conditions(config, captions, classes), path)
    elif config.inpainting is not None:
        holes = Holes(config, num_samples=config.samples_per_class)
        num_samples = draw_dataset_fills(generator, holes, captions, path, has_models=True)
    elif config.super_resolution.factor:
        conditions = _enlarged(config, generator, captions, classes)
        with _progress(config, len(conditions.inputs or ())) as bar:
            num_samples = draw_enlargements(
                generator, conditions, path, callback=lambda step, x: bar.update()
            )
    else:
        conditions = grid_conditions(config, captions, classes)
        with _progress(config, _grid_size(config, conditions)) as bar:
            num_samples = draw_grid(
                generator, conditions, path, callback=lambda step, x: bar.update(), has_models=True
            )
    results.save_config(config, "sample")
    say(f"sampled {num_samples} {generator.what} with the weights of {source}")
    results.say_where(folder, samples=path)
    return 0


def _enlarged(
    config: ExperimentConfig,
    generator: SampleGenerator,
    captions: CaptionSource | None,
    classes: tuple[str, ...],
) -> Conditions:
    """What the grid of a super-resolution model enlarges: samples of its cascade, files, or the data."""
    if not config.cascade:
        number = config.samples_per_class
        return given_conditions(config, generator, captions, num_samples=number, classes=classes)
    conditions = grid_conditions(config, captions, classes)
    rows = torch.arange(max(1, len(conditions.names))).repeat_interleave(config.samples_per_class)
    return cascade_conditions(config, generator, captions, conditions, rows)


def _progress(config: ExperimentConfig, num_samples: int) -> AbstractContextManager[Any]:
    """A bar that counts the sampling steps of all batches."""
    num_batches = -(-num_samples // config.per_proc_batch_size)
    return progress("sampling", total=num_batches * config.sampler.num_steps)


def draw_grid(
    generator: SampleGenerator,
    conditions: Conditions,
    path: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
    callback: Callable[[int, Tensor], object] | None = None,
    may_fail: bool = True,
    has_models: bool = False,
) -> int:
    """Writes a PNG with `samples_per_class` samples of each condition. Returns the number of samples.

    For videos the PNG shows frames from left to right. An MP4 and a GIF of the grid are written beside it.
    Shapes are shown from several sides, and the GIF turns them.

    Args:
        weights, callback: see `SampleGenerator.draw`.
        may_fail: False writes a grid also without a single finite sample, as a training does.
        has_models: write each shape as a file too, in a folder with the name of the grid.

    Raises:
        ValueError: no sample is finite, and `may_fail`. A cross marks each of a few.
    """
    config = generator.config
    columns = len(conditions.names) or min(8, config.samples_per_class)
    num_samples = _grid_size(config, conditions)
    rows = torch.arange(num_samples) % columns
    batches = generator.draw_batches(
        lambda some: conditions.of(some, generator.device), rows, weights=weights, callback=callback
    )
    drawn = torch.cat([batch.cpu() for batch in batches])
    samples = marked(drawn, config, generator.source, may_fail=may_fail)
    scale = generator.normalization
    save_cells(samples, path, config, columns=columns, titles=conditions.titles, normalization=scale)
    if config.voxel_size and has_models:
        save_models(samples, path.with_suffix(""), config)
    return num_samples


def _grid_size(config: ExperimentConfig, conditions: Conditions) -> int:
    """Number of samples in a grid. Without conditions there are `samples_per_class`."""
    return config.samples_per_class * max(1, len(conditions.names))
