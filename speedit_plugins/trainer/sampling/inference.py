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
from speedit_plugins.trainer import checkpoints, results
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.evaluation.npz import write_npz
from speedit_plugins.trainer.models.pretrained.text import CaptionSource
from speedit_plugins.trainer.results import CAPTIONS, LABELS, MASKED, STAGES, UNFINISHED
from speedit_plugins.trainer.sampling.conditions import (
    Conditions,
    all_conditions,
    prompts,
    random_rows,
    repeats,
)
from speedit_plugins.trainer.sampling.files.sample_files import save_sample, saved_form, suffix_of
from speedit_plugins.trainer.sampling.finite import check_all, of_one_value
from speedit_plugins.trainer.sampling.generator import SampleGenerator, find_weights, load_generator
from speedit_plugins.trainer.sampling.inpainting.holes import Holes, written_fills
from speedit_plugins.trainer.sampling.super_resolution.cascade import cascade_conditions, stage_weights
from speedit_plugins.trainer.sampling.super_resolution.low_resolution_sets import given_conditions
from speedit_plugins.trainer.sampling.super_resolution.originals import write_items
from speedit_plugins.trainer.sampling.super_resolution.stage_sets import (
    cascade_of,
    earlier_samples,
    on_data,
    stage_sets,
    write_list,
)
from speedit_plugins.trainer.terminal import progress, say


def inference(config: ExperimentConfig) -> int:
    """Draws `num_samples` samples: of random classes, or of the prompts in turn. Returns the exit code.

    A super-resolution model enlarges samples of `low_resolution`, or of the data, in turn, or those that the
    stages of its `cascade` draw.

    An inpainting model fills holes in as many samples of the dataset, each with its own class or caption.
    What it was given is in a second folder, `..._masked`, see `save_known`.

    With `score_stages` the samples of each stage of a cascade are in another folder, see `stage_sets`.

    Images become PNG files and one npz in ADM's format, videos become MP4 files, and shapes NPY files, see
    `save_shape`. captions.jsonl beside them has the prompts, labels.jsonl the classes. The folder gets its
    final name when it is complete.

    Raises:
        ValueError: an earlier inference has written files of the same name, or another one is writing them.
            Or a sample is not finite: a set with black images in place of samples must not be scored.
    """
    source = find_weights(config, tell=say)
    places = _Places(Path(config.experiment_dir) / results.INFERENCE / _name(config, source))
    places.check_free()
    holes = None if config.inpainting is None else Holes(config, num_samples=config.num_samples)
    generator, captions, _ = load_generator(config, source)
    classes = checkpoints.class_names(source)
    conditions = _conditions(config, generator, captions, classes)
    partial = places.partial
    with (
        _claimed(places),
        progress("inference", total=_total(config), unit=generator.what[:-1]) as bar,
        _all_or_none(places, bar, generator.what),
    ):
        if holes is None:
            written = _written(generator, conditions, partial, bar)
        else:
            written = written_fills(generator, holes, captions, partial, bar)
        if config.num_frames or config.voxel_size:
            for _ in written:
                pass
        else:
            write_npz(places.partial_npz, written, num_images=config.num_samples)
        if config.score_stages:
            _write_stages(generator, captions, conditions, partial / STAGES, bar)
        places.publish()
    results.save_config(config, "inference")
    say(f"drew {config.num_samples} {generator.what} with the weights of {source}")
    named = {"npz": places.npz, "with holes": places.masked, "of stages": places.stages}
    for name, place in {generator.what: places.folder, **named}.items():
        if place.exists():
            say(f"  {name:<12} {place}{'/' if place.is_dir() else ''}")
    return 0


def _conditions(
    config: ExperimentConfig,
    generator: SampleGenerator,
    captions: CaptionSource | None,
    classes: tuple[str, ...],
) -> Conditions:
    """The conditions of the samples, with what a super-resolution model enlarges."""
    if config.super_resolution.factor and not config.cascade:
        number = config.num_samples
        return given_conditions(config, generator, captions, num_samples=number, classes=classes)
    conditions = all_conditions(config, captions, classes)
    if not config.cascade:
        return conditions
    rows = random_rows(conditions, config.num_samples, seed=config.seed)
    return cascade_conditions(config, generator, captions, conditions, rows)


@contextmanager
def _claimed(places: "_Places") -> Iterator[None]:
    """A context with an empty folder, emptied of what a killed inference left, that no other one writes.

    Raises:
        ValueError: another inference is writing it, or has written it meanwhile.
    """
    partial = places.partial
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
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            # Another one may have finished since the first look.
            places.check_free()
        except ValueError:
            partial.rmdir()
            raise
        yield
    finally:
        os.close(handle)


@contextmanager
def _all_or_none(places: "_Places", bar: Any, what: str) -> Iterator[None]:
    """A context that removes what was drawn if not all of it was.

    Raises:
        KeyboardInterrupt: a signal ended it. The message says how far it was.
    """
    try:
        yield
    except BaseException as error:
        shutil.rmtree(places.partial, ignore_errors=True)
        places.partial_npz.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt):
            error.args = (f"interrupted after {bar.n} of {bar.total} {what}; none of them is kept",)
        raise


class _Places:
    """The folder of the samples, and what is beside it while they are drawn and afterwards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        suffixes = (UNFINISHED, ".npz", f".npz{UNFINISHED}", f"_{MASKED}", f"_{STAGES}")
        self.partial, self.npz, self.partial_npz, self.masked, self.stages = (
            folder.with_name(f"{folder.name}{suffix}") for suffix in suffixes
        )

    def check_free(self) -> None:
        """Raises ValueError if an earlier inference has written files of the same name."""
        for path in (self.folder, self.npz, self.masked, self.stages):
            if path.exists():
                raise ValueError(f"inference would write over {path}; move or delete it")

    def publish(self) -> None:
        """Gives what was written its final name."""
        finals = (self.masked, self.stages, self.folder, self.npz)
        for partial, final in zip(
            (self.partial / MASKED, self.partial / STAGES, self.partial, self.partial_npz),
            finals,
            strict=True,
        ):
            if partial.exists():
                partial.rename(final)


def _name(config: ExperimentConfig, source: Path) -> str:
    """A name for the samples, from the settings that decide them."""
    # A checkpoint's folder means its averaged weights.
    parts = [source.name if source.is_dir() else source.stem]
    if source.name == checkpoints.EMA:
        parts = [source.absolute().parent.name]
    elif source.name == checkpoints.MODEL:
        parts = [source.absolute().parent.name, source.stem]
    sampler = config.sampler
    parts += [f"{sampler.type}{sampler.num_steps}", *([f"eta{sampler.eta:g}"] if sampler.eta else [])]
    parts += [] if sampler.percentile is None else [f"dynamic{sampler.percentile:g}"]
    parts += [f"n{config.num_samples}", f"cfg{config.guidance_scale:g}{_schedule_name(config)}"]
    parts.append(f"seed{config.seed}")
    if config.inpainting is not None:
        parts.append(f"holes{_hash(config.inpainting)}")
    elif config.cascade:
        before = [str(path) for path in stage_weights(config)]
        parts.append(f"cascade{_hash([*before, sampler.augmentation, *prompts(config)])}")
    elif config.super_resolution.factor:
        parts.append(f"low{_hash([config.low_resolution, sampler.augmentation])}")
    elif config.text_encoder is not None:
        parts.append(f"prompts{_hash(prompts(config))}")
    return "_".join(parts)


def _schedule_name(config: ExperimentConfig) -> str:
    sampler = config.sampler
    if sampler.guidance_schedule == "constant":
        return ""
    own = [] if sampler.guidance_power is None else [sampler.guidance_power]
    numbers = "-".join(f"{value:g}" for value in (*own, *sampler.guidance_interval))
    return f"-{sampler.guidance_schedule}{numbers}"


def _hash(value: Any) -> str:
    """Eight digits for plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def _written(generator: SampleGenerator, conditions: Conditions, folder: Path, bar: Any) -> Iterator[Any]:
    """Chunks of uint8 samples (B, [F,] H, W, C), or of shapes. Each is in `folder` before it is yielded."""
    config = generator.config
    rows = random_rows(conditions, config.num_samples, seed=config.seed)
    suffix = suffix_of(config)
    if (line := repeats(conditions, config.num_samples)) is not None:
        say(line)
    done = flat = 0
    for batch in generator.draw_batches(lambda some: conditions.of(some, generator.device), rows):
        check_all(batch, done, config, generator.source)
        samples = saved_form(batch, config)
        flat += 0 if config.voxel_size else of_one_value(torch.from_numpy(samples))
        for i, item in enumerate(samples, start=done):
            save_sample(item, folder / f"{i:06d}", config)
        if config.score_stages:
            _write_earlier(conditions, rows[done : done + len(samples)], folder / STAGES, config, first=done)
        done += len(samples)
        bar.update(len(samples))
        yield samples
    if flat:
        say(f"warning: {flat} of {done} {generator.what} have the same value in every pixel")
    _write_conditions(conditions, rows.tolist(), folder, suffix=suffix)
    write_items(conditions, rows.tolist(), folder, suffix=suffix)


def _write_earlier(
    conditions: Conditions, rows: torch.Tensor, folder: Path, config: ExperimentConfig, *, first: int
) -> None:
    """Writes what the stages before the last one drew for the samples at rows (B,), numbered from `first`."""
    for name, samples in earlier_samples(conditions, rows):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, item in enumerate(saved_form(samples, config), start=first):
            save_sample(item, folder / name / f"{number:06d}", config)


def _write_stages(
    generator: SampleGenerator,
    captions: CaptionSource | None,
    conditions: Conditions,
    folder: Path,
    bar: Any,
) -> None:
    """Completes the sets of the stages that the cascade drew, and draws each stage on inputs of the data."""
    config, generators = generator.config, cascade_of(conditions, generator)
    rows = random_rows(conditions, config.num_samples, seed=config.seed).tolist()
    for number in range(1, len(generators)):
        _write_conditions(conditions, rows, folder / f"stage_{number}", suffix=suffix_of(config))
    for name, drawing, given in on_data(config, generators, captions):
        (folder / name).mkdir()
        for _ in _written(drawing, given, folder / name, bar):
            pass
    write_list(folder, stage_sets(generators))


def _total(config: ExperimentConfig) -> int:
    """How many samples are drawn, without those that the stages of a cascade hand on."""
    return config.num_samples * (1 + (len(config.cascade) if config.score_stages else 0))


def _write_conditions(conditions: Conditions, rows: list[int], folder: Path, *, suffix: str) -> None:
    """Writes a line for each sample with its prompt, or with its class; nothing without conditions."""
    if not conditions.names:
        return
    lines = []
    for i, row in enumerate(rows):
        about: dict[str, Any] = {"file_name": f"{i:06d}{suffix}"}
        if conditions.labels is None:
            about["caption"] = conditions.names[row]
        else:
            about["label"] = int(conditions.labels[row])
            about |= {"class": conditions.titles[row]} if conditions.titles else {}
        lines.append(json.dumps(about))
    name = LABELS if conditions.captions is None else CAPTIONS
    write_whole(folder / name, "".join(f"{line}\n" for line in lines).encode())
