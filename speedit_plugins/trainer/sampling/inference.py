"""The phase inference: many samples from a trained model, as files.

Dims: B samples, C channels, F frames (absent for images), H x W pixels.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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
from speedit_plugins.trainer.terminal import progress, say


def inference(config: ExperimentConfig) -> int:
    """Draws `num_samples` samples: of random classes, or of the prompts in turn. Returns the exit code.

    Images become PNG files and one npz in ADM's format, videos become MP4 files. captions.jsonl beside them
    has the prompts. The folder gets its final name when it is complete.

    Raises:
        ValueError: an earlier inference has written files of the same name, or another one is writing them.
    """
    source = find_weights(config)
    folder = Path(config.experiment_dir) / results.INFERENCE / _name(config, source)
    suffixes = (UNFINISHED, ".npz", f".npz{UNFINISHED}")
    partial, npz, partial_npz = (folder.with_name(f"{folder.name}{suffix}") for suffix in suffixes)
    for path in (folder, npz):
        if path.exists():
            raise ValueError(f"inference would write over {path}; move or delete it")
    generator, captions, _ = load_generator(config)
    conditions = all_conditions(config, captions)
    with (
        _claimed(partial),
        progress("inference", total=config.num_samples, unit=generator.what[:-1]) as bar,
        _all_or_none(partial, bar, generator.what),
    ):
        if config.num_frames:
            for _ in _written(generator, conditions, partial, bar):
                pass
        else:
            written = _written(generator, conditions, partial, bar)
            write_npz(partial_npz, written, num_images=config.num_samples)
        partial.rename(folder)
        if not config.num_frames:
            partial_npz.rename(npz)
    results.save_config(config, "inference")
    say(f"drew {config.num_samples} {generator.what} with the weights of {source}")
    say(f"  {generator.what:<12} {folder}/")
    if not config.num_frames:
        say(f"  npz          {npz}")
    return 0


@contextmanager
def _claimed(partial: Path) -> Iterator[None]:
    """A context with an empty folder, emptied of what a killed inference left, that no other one writes.

    Raises:
        ValueError: another inference is writing it.
    """
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        is_free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError as error:
            say(f"{partial}: its file system has no locks ({error.strerror})")
        # The other inference may have renamed or removed its folder meanwhile.
        if not is_free or not partial.exists() or not os.path.samestat(os.fstat(handle), partial.stat()):
            raise ValueError(f"another inference is writing {partial}; wanted other settings, or wait for it")
        for left in partial.iterdir():
            left.unlink()
        yield
    finally:
        os.close(handle)


@contextmanager
def _all_or_none(partial: Path, bar: Any, what: str) -> Iterator[None]:
    """A context that removes what was drawn if not all of it was.

    Raises:
        KeyboardInterrupt: a signal ended it. The message says how far it was.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"interrupted after {bar.n} of {bar.total} {what}; none of them is kept",)
        raise


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
    if config.text_encoder is not None:
        parts.append(f"prompts{hashlib.sha256(json.dumps(prompts(config)).encode()).hexdigest()[:8]}")
    return "_".join(parts)


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
