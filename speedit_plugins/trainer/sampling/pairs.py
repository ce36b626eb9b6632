"""Metrics of the phase test for inpainting: each fill against the image that the hole was made in.

Dims: B images, C channels, H x W pixels.
"""

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.metrics import MetricValue
from speedit_plugins.trainer.evaluation.pairs import PAIRED
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.sampling.holes import Holes
from speedit_plugins.trainer.sampling.sample_sets import SampleSet
from speedit_plugins.trainer.terminal import progress


def measure_pairs(config: ExperimentConfig, samples: SampleSet) -> list[MetricValue]:
    """The metrics of pairs that the config asks for, averaged over the samples; none needs features.

    The images and their holes are drawn again from dataset, `inpainting` and seed, as inference drew them.

    Raises:
        ValueError: the samples are not fills of these holes, since other pixels differ.
    """
    wanted = {name: PAIRED[name] for name in config.evaluation.metrics if name in PAIRED}
    if not wanted:
        return []
    holes = Holes(config, num_images=len(samples))
    totals = dict.fromkeys(wanted, 0.0)
    size, done = config.evaluation.batch_size, 0
    with progress("pairs", total=len(samples), unit="image") as bar:
        for fills in samples.batches(size):
            given = holes.at(holes.items[done : done + len(fills)])
            originals = torch.from_numpy(images.to_uint8(given.images))
            inside = given.masks[:, 0] > 0
            _check_known(samples.source, fills, originals, inside, first=done)
            for name, measure in wanted.items():
                totals[name] += float(measure(fills, originals, inside).sum())
            done += len(fills)
            bar.update(len(fills))
    number = len(samples)
    return [
        MetricValue(name, total / number, "pixels", number, number, has_reference=True)
        for name, total in totals.items()
    ]


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
