"""The phase test: a distance between samples and reference, in a named feature space.

Dims: N images, C channels, H x W pixels.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins.engine import build, pictures, results
from speedit_plugins.engine.schema import ExperimentConfig
from speedit_plugins.engine.tracking import say
from speedit_plugins.evaluation.metrics import feature_statistics, frechet_distance
from speedit_plugins.evaluation.npz import read_npz
from speedit_plugins.registry import FEATURES
from speedit_plugins.registry import build as build_registered


def test(config: ExperimentConfig) -> int:
    """Fréchet distance of sampled images to a reference npz, or else to the dataset; writes test.json."""
    folder = Path(config.experiment_dir)
    samples_path = Path(config.samples) if config.samples else _newest_npz(folder / results.INFERENCE)
    samples = torch.from_numpy(read_npz(samples_path))
    reference, labels, source = _reference_images(config)
    extractor = build_registered(FEATURES, config.features, images=reference, labels=labels)
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
    dataset = build.build_dataset(config)
    generator = torch.Generator().manual_seed(config.seed)
    items = [dataset.load(i, generator) for i in range(len(dataset))]
    images = torch.cat([torch.from_numpy(pictures.to_uint8(item["image"][None])) for item in items])
    labels = torch.tensor([item["label"] for item in items]) if config.num_classes else None
    return images, labels, f"dataset {config.data.dataset['type']}"


def _newest_npz(folder: Path) -> Path:
    found = sorted(folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no npz in {folder}: run the phase inference first, or give samples")
    return found[-1]
