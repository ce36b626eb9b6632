"""The phase test: a distance between samples and reference, in a named feature space.

Dims: N images, C channels, H x W pixels.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.data.latents import LatentCache
from speedit_plugins.engine import build, pictures, results
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.engine.tracking import say
from speedit_plugins.evaluation.metrics import feature_statistics, frechet_distance
from speedit_plugins.evaluation.npz import read_npz
from speedit_plugins.registry import FEATURES
from speedit_plugins.registry import build as build_registered

# A covariance of 4096 features takes 128 MiB in float64; usual feature spaces have at most 2048.
MAX_FEATURES = 4096


def test(config: ExperimentConfig) -> int:
    """Fréchet distance of sampled images to a reference npz, or else to the dataset; writes test.json."""
    folder = Path(config.experiment_dir)
    samples_path = Path(config.samples) if config.samples else _newest_npz(folder / results.INFERENCE)
    samples = torch.from_numpy(read_npz(samples_path))
    reference, labels, source = _reference_images(config)
    extractor = build_registered(FEATURES, config.features, images=reference, labels=labels)
    if extractor.dim > MAX_FEATURES:
        raise ValueError(
            f"features {extractor.name!r} have {extractor.dim} dimensions, wanted at most {MAX_FEATURES}:"
            f" their covariance would take {8 * extractor.dim**2 / 2**30:.0f} GiB; pixels@8 has few"
        )
    ours, theirs = feature_statistics(samples, extractor), feature_statistics(reference, extractor)
    distance = frechet_distance(ours.mean, ours.covariance, theirs.mean, theirs.covariance)
    result = {
        f"frechet_distance[{extractor.name}]": distance,
        "feature_dim": extractor.dim,
        "num_samples": len(samples),
        "num_reference": len(reference),
        "samples": str(samples_path),
        "reference": source,
    }
    results.save_config(config, "test")
    (folder / results.TEST).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"Fréchet distance [{extractor.name}, {extractor.dim}-d]: {distance:.4f}")
    say(f"  samples      {len(samples)} of {samples_path}")
    say(f"  reference    {len(reference)} of {source}")
    # The bias of the distance falls with the number of samples per dimension; ten is a usual least.
    if len(samples) < 10 * extractor.dim:
        say(f"  few samples for {extractor.dim} dimensions: the distance is biased upwards")
    say(f"  result       {folder / results.TEST}")
    return 0


def _reference_images(config: ExperimentConfig) -> tuple[Tensor, Tensor | None, str]:
    """uint8 images (N, H, W, C), labels (N,) where known, and what to call them."""
    if config.reference is not None:
        return torch.from_numpy(read_npz(config.reference)), None, config.reference
    dataset = build.build_dataset(config, augmented=False)
    if isinstance(dataset, LatentCache) or getattr(dataset, "buckets", None) is not None:
        raise ValueError(
            "test compares images of one size, got a LatentCache or buckets; wanted reference: NPZ, or the"
            " image dataset without buckets"
        )
    generator = torch.Generator().manual_seed(config.seed)
    images, labels = [], []
    # One image at a time: as uint8 a quarter of its float form stays.
    for index in range(len(dataset)):
        item = dataset.load(index, generator)
        images.append(torch.from_numpy(pictures.to_uint8(item["image"][None])))
        labels.append(item["label"])
    known = torch.tensor(labels) if config.num_classes else None
    return torch.cat(images), known, f"dataset {config.data.dataset['type']}"


def _newest_npz(folder: Path) -> Path:
    found = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no npz in {folder}: run the phase inference first, or give samples")
    return found[-1]
