"""Metrics of the phase test for pairs: each fill or enlarged image against the image that it was made of.

Dims: B images, C channels, H x W pixels.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.metrics import MetricValue
from speedit_plugins.trainer.evaluation.pairs import PAIRED
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.sampling.files.sample_sets import SampleSet
from speedit_plugins.trainer.sampling.inpainting.holes import Holes
from speedit_plugins.trainer.sampling.super_resolution.originals import enlarged_pairs
from speedit_plugins.trainer.terminal import progress


def measure_pairs(config: ExperimentConfig, samples: SampleSet) -> list[MetricValue]:
    """The metrics of pairs that the config asks for, averaged over the samples; none needs features.

    The images and their holes are drawn again from dataset, `inpainting` and seed, as inference drew them.
    What enlarged images were made of is in a file beside them.

    Raises:
        ValueError: the samples are not fills of these holes, since other pixels differ; or it is not known
            what they were made of.
    """
    wanted = {name: PAIRED[name] for name in config.evaluation.metrics if name in PAIRED}
    if not wanted:
        return []
    if samples.is_video:
        raise ValueError(f"{', '.join(wanted)} compare images, got videos; wanted other metrics")
    totals = dict.fromkeys(wanted, 0.0)
    with progress("pairs", total=len(samples), unit="image") as bar:
        for made, originals, inside in _pairs(config, samples):
            for name, measure in wanted.items():
                totals[name] += float(measure(made, originals, inside).sum())
            bar.update(len(made))
    number = len(samples)
    return [
        MetricValue(name, total / number, "pixels", number, number, has_reference=True)
        for name, total in totals.items()
    ]


def _pairs(config: ExperimentConfig, samples: SampleSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Samples and their originals, uint8 (B, H, W, C), and where they may differ, bool (B, H, W)."""
    size, done = config.evaluation.batch_size, 0
    if config.super_resolution.factor:
        for made, originals in enlarged_pairs(config, samples, size):
            yield made, originals, torch.ones(made.shape[:3], dtype=torch.bool)
        return
    holes = Holes(config, num_samples=len(samples))
    for fills in samples.batches(size):
        given = holes.at(holes.items[done : done + len(fills)])
        originals = torch.from_numpy(images.to_uint8(given.samples))
        inside = given.masks[:, 0] > 0
        _check_known(samples.source, fills, originals, inside, first=done)
        yield fills, originals, inside
        done += len(fills)


def _check_known(source: str, fills: Tensor, originals: Tensor, inside: Tensor, *, first: int) -> None:
    """Raises ValueError if a fill is of another image or another hole: fills keep the pixels around it."""
    if fills.shape != originals.shape:
        raise ValueError(
            f"{source} holds images of {tuple(fills.shape[1:])}, those of the dataset are"
            f" {tuple(originals.shape[1:])}"
        )
    kept = ((fills == originals).all(dim=-1) | inside).flatten(1).all(dim=1)
    if not kept.all():
        number = first + int(kept.int().argmin())
        raise ValueError(
            f"{source}: sample {number} is no fill of the hole in its image, since pixels outside of it"
            " differ; wanted what inference wrote with this dataset, inpainting, seed and number of samples"
        )
