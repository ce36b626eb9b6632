"""The phase inference: many samples from a trained model, as files.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from speedit_plugins.files import write_whole
from speedit_plugins.trainer import checkpoint, results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import LABEL_STREAM, stream_seed
from speedit_plugins.trainer.evaluation.npz import write_npz
from speedit_plugins.trainer.logging import images
from speedit_plugins.trainer.results import CAPTIONS, UNFINISHED
from speedit_plugins.trainer.sampling.conditions import Conditions, all_conditions, prompts
from speedit_plugins.trainer.sampling.generator import SampleGenerator, find_weights, load_generator
from speedit_plugins.trainer.sampling.holes import MASKED, Holes, fills, written_fills
from speedit_plugins.trainer.terminal import progress, say


def inference(config: ExperimentConfig) -> int:
    """Draws `num_samples` samples: of random classes, or of the prompts in turn. Returns the exit code.

    An inpainting model fills holes in as many images of the dataset, each with its own class or caption. What
    it was given is in a second folder, `..._masked`, transparent in the hole.

    Images become PNG files and one npz in ADM's format, videos become MP4 files. captions.jsonl beside them
    has the prompts. The folder gets its final name when it is complete.

    Raises:
        ValueError: an earlier inference has written files of the same name.
    """
    source = find_weights(config)
    places = _Places(Path(config.experiment_dir) / results.INFERENCE / _name(config, source))
    places.check_free()
    holes = None if config.inpainting is None else Holes(config, num_images=config.num_samples)
    generator, captions, _ = load_generator(config)
    conditions, partial = all_conditions(config, captions), places.partial
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with progress("inference", total=config.num_samples, unit=generator.what[:-1]) as bar:
        if config.num_frames:
            for _ in _written(generator, conditions, partial, bar):
                pass
        else:
            if holes is None:
                written = _written(generator, conditions, partial, bar)
            else:
                written = written_fills(fills(generator, holes, captions), partial, bar)
            write_npz(places.partial_npz, written, num_images=config.num_samples)
    places.publish()
    results.save_config(config, "inference")
    say(f"drew {config.num_samples} {generator.what} with the weights of {source}")
    for name, place in ((generator.what, places.folder), ("npz", places.npz), ("with holes", places.masked)):
        if place.exists():
            say(f"  {name:<12} {place}{'/' if place.is_dir() else ''}")
    return 0


class _Places:
    """The folder of the samples, and what is beside it while they are drawn and afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        suffixes = (UNFINISHED, ".npz", f".npz{UNFINISHED}", f"_{MASKED}")
        self.partial, self.npz, self.partial_npz, self.masked = (
            folder.with_name(f"{folder.name}{suffix}") for suffix in suffixes
        )

    def check_free(self) -> None:
        """Raises ValueError if an earlier inference has written files of the same name."""
        for path in (self.folder, self.npz, self.masked):
            if path.exists():
                raise ValueError(f"inference would write over {path}; move or delete it")

    def publish(self) -> None:
        """Gives what was written its final name."""
        finals = (self.masked, self.folder, self.npz)
        for partial, final in zip(
            (self.partial / MASKED, self.partial, self.partial_npz), finals, strict=True
        ):
            if partial.exists():
                partial.rename(final)


def _name(config: ExperimentConfig, source: Path) -> str:
    """A name for the samples, from the settings that decide them."""
    # A checkpoint's folder means its averaged weights.
    parts = [source.name if source.is_dir() else source.stem]
    if source.name == checkpoint.EMA:
        parts = [source.absolute().parent.name]
    elif source.name == checkpoint.MODEL:
        parts = [source.absolute().parent.name, source.stem]
    sampler = config.sampler
    parts += [f"{sampler.type}{sampler.num_steps}", *([f"eta{sampler.eta:g}"] if sampler.eta else [])]
    parts += [f"n{config.num_samples}", f"cfg{config.guidance_scale:g}", f"seed{config.seed}"]
    if config.inpainting is not None:
        parts.append(f"holes{_hash(config.inpainting)}")
    elif config.text_encoder is not None:
        parts.append(f"prompts{_hash(prompts(config))}")
    return "_".join(parts)


def _hash(value: Any) -> str:
    """Eight digits for plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def _written(generator: SampleGenerator, conditions: Conditions, folder: Path, bar: Any) -> Iterator[Any]:
    """Chunks of uint8 samples (B, [F,] H, W, C). Each is written to `folder` before it is yielded."""
    config = generator.config
    chooser = torch.Generator().manual_seed(stream_seed(config.seed, LABEL_STREAM))
    rows = torch.arange(config.num_samples) % max(1, len(conditions.names))
    if conditions.labels is not None:
        rows = torch.randint(len(conditions.names), (config.num_samples,), generator=chooser)
    done = 0
    for batch in generator.draw_batches(lambda some: conditions.of(some, generator.device), rows):
        samples = images.to_uint8(batch)
        for i, item in enumerate(samples, start=done):
            images.save(item, folder / f"{i:06d}", frames_per_second=config.frames_per_second)
        done += len(samples)
        bar.update(len(samples))
        yield samples
    if conditions.captions is not None:
        suffix = ".mp4" if config.num_frames else ".png"
        captions = (conditions.names[row] for row in rows.tolist())
        lines = [
            json.dumps({"file_name": f"{i:06d}{suffix}", "caption": text}) for i, text in enumerate(captions)
        ]
        write_whole(folder / CAPTIONS, "".join(f"{line}\n" for line in lines).encode())
