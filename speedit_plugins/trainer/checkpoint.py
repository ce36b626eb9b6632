"""Checkpoints: folders that are complete or absent, written and read by all ranks together.

`checkpoints/step_0000100/` holds model.safetensors and ema.safetensors (whole float32 weights; with adapters,
the trained ones alone), a file of optimizer moments per rank, state.pt (data position, policy, loss scale,
what the optimizer keeps besides moments: plain values and tensors), config.yaml, classes.json where the data
name their classes, normalization.json of point clouds, and manifest.json with the size and SHA-256 of each
file. Without an average there is no ema.safetensors. If several are kept, others are
ema_<length>.safetensors.
"""

import itertools
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from speedit_plugins.files import flush, pickle_fault, sha256_of, usual_mode
from speedit_plugins.trainer import saved_configs
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.parallel.saved_moments import Moments
from speedit_plugins.trainer.terminal import say

MODEL, EMA, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", saved_configs.CONFIG
MANIFEST, CLASSES, NORMALIZATION = "manifest.json", "classes.json", "normalization.json"
_NAME = re.compile(r"step_(\d{7,})")
_AVERAGE = re.compile(r"ema_[\w.+-]+\.safetensors")
_MOMENTS = re.compile(r"optimizer_(\d{5,})_of_(\d{5,})\.safetensors")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read. The message names it, and the last good one."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds. Only rank 0's values are written, except for `moments`.

    Args:
        model: state dict of the model.
        ema: the state dict with averaged weights; empty if the run keeps no average.
        state: plain values and tensors, at any depth.
        config: the run's config as YAML text.
        moments: this rank's slices of the optimizer's state.
        classes: names of the classes, by number; empty if they have none.
        normalization: a dataclass that undoes the data's own scaling, or None.
        averages: state dicts with further averages, by label.
        metadata: of the files of weights.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: str
    moments: Mapping[str, Slice] = field(default_factory=dict)
    classes: Sequence[str] = ()
    normalization: Any = None
    averages: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read. `moments` are whole flat tensors, each read when it is asked for.

    `ema` is empty if the run kept no average.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: str
    moments: Moments
    averages: Mapping[str, Mapping[str, Tensor]]


def save(
    folder: Path,
    step: int,
    contents: Contents,
    *,
    keep_last: int,
    keep_every: int = 0,
    kept: Collection[str] = (),
    runtime: Runtime | None = None,
) -> Path:
    """Writes `folder/step_<step>`, then removes older checkpoints. Collective.

    Args:
        keep_last: how many of the newest checkpoints to keep, >= 1.
        keep_every: also keep checkpoints at multiples of this step; 0 keeps none of them.
        kept: names of folders to keep as well.
        runtime: None is a single process.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: a rank cannot write (disk full, folder not writable). All ranks raise it, and earlier
            checkpoints stay as they were.
    """
    runtime = runtime or Runtime()
    target = folder / f"step_{step:07d}"
    partial = target.with_suffix(".tmp")
    try:
        if runtime.is_main:
            _together(runtime, target, lambda: _fresh(partial))
            written = _together(runtime, target, lambda: _write_whole(partial, contents, runtime))
        else:
            _together(runtime, target, lambda: None)
            written = _together(runtime, target, lambda: _write_moments(partial, contents, runtime))
        files = {name: facts for part in written for name, facts in part.items()}
        publish = _publisher(partial, target, {"step": step, "files": files}) if runtime.is_main else None
        _together(runtime, target, publish or (lambda: None))
    except BaseException:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if runtime.is_main:
        try:
            _remove_old(target, keep_last, keep_every, kept)
        except OSError as error:
            say(f"older checkpoints beside {target} cannot be removed: {error}")
    return target


def load(path: Path) -> Saved:
    """Reads the checkpoint folder `path`; check it with `damage` first.

    Raises:
        CheckpointError: there is no such folder, or a file is missing or cannot be read.
    """
    wanted = (MODEL, sampled_file(path), STATE, CONFIG, MANIFEST)
    missing = [name for name in dict.fromkeys(wanted) if not (path / name).is_file()]
    if missing:
        what = f"lacks {', '.join(missing)}" if path.is_dir() else "is not a folder"
        raise CheckpointError(f"no checkpoint to read: {path} {what}")
    try:
        return Saved(
            model=load_file(path / MODEL),
            ema=load_file(path / EMA) if sampled_file(path) == EMA else {},
            state=torch.load(path / STATE, map_location="cpu", weights_only=True),
            config=(path / CONFIG).read_text(encoding="utf-8"),
            moments=Moments(path),
            averages={label: load_file(path / name) for name, label in _other_averages(path)},
        )
    # A cut file can fail in any layer: zip, pickle, safetensors, text decoding.
    except Exception as error:
        fault = f"{type(error).__name__}: {pickle_fault(error)}"
        raise CheckpointError(f"checkpoint {path} is damaged: {fault}") from None


def class_names(source: Path) -> tuple[str, ...]:
    """Names of the classes, by number, of a checkpoint's folder or of a file in it; empty if it has none.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = (source if source.is_dir() else source.parent) / CLASSES
    if not path.is_file():
        return ()
    try:
        return tuple(map(str, json.loads(path.read_text(encoding="utf-8"))))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def sampled_file(path: Path) -> str:
    """Name of a checkpoint's file with the weights to sample with: EMA, or MODEL if no average is kept.

    If the manifest cannot be read it is the average, so that its absence is noticed.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return MODEL if EMA not in files and MODEL in files else EMA
    except (OSError, ValueError, KeyError, TypeError):
        return EMA


def damage(path: Path, runtime: Runtime | None = None, *, only: str | None = None) -> str | None:
    """What is wrong with the files of a checkpoint, by size and hash; None if nothing is. Collective.

    Each rank reads a part of the files.

    Args:
        only: name of the only file to check; None checks all. EMA is the model where no average is kept.
    """
    runtime = runtime or Runtime()
    found = [report for report in runtime.gather_objects(_own_damage(path, runtime, only)) if report]
    return found[0] if found else None


def newest_whole(
    found: Sequence[Path], runtime: Runtime | None = None, *, only: str | None = None
) -> Path | None:
    """The first of these checkpoints that is not damaged; None if there are none. Collective.

    Prints a line for each damaged one.

    Args:
        found: checkpoint folders, the newest first.
        only: see `damage`.

    Raises:
        CheckpointError: all of them are damaged.
    """
    runtime = runtime or Runtime()
    for path in found:
        reason = damage(path, runtime, only=only)
        if reason is None:
            return path
        if runtime.is_main:
            say(f"checkpoint {path} is damaged: {reason}; looking for an earlier one")
    if found:
        raise CheckpointError(f"every checkpoint of the run is damaged, the newest is {found[0]}")
    return None


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`; None if there is none."""
    found = newest_first(folder)
    return found[0] if found else None


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the highest step first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    step = step_in_name(path)
    if step is None:
        raise CheckpointError(f"a checkpoint folder is named step_<number>, got {path}")
    return step


def step_in_name(path: Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for a folder of another name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def _together(runtime: Runtime, target: Path, action: Callable[[], Any]) -> list[Any]:
    """What `action` returned on each rank. If it fails on one rank, all ranks raise."""
    result, failure = None, None
    try:
        result = action()
    # Every kind of error, because the other ranks wait to hear of it.
    except Exception as error:
        failure = error
    said = runtime.gather_objects((result, None if failure is None else str(failure)))
    for rank, (_, message) in enumerate(said):
        if message is not None:
            earlier = [p for p in newest_first(target.parent) if step_of(p) < step_of(target)]
            kept = f"the last checkpoint is {earlier[0]}" if earlier else "there is no earlier checkpoint"
            where = f" on rank {rank}" if runtime.world_size > 1 else ""
            raise CheckpointError(f"cannot write checkpoint {target}{where}: {message}; {kept}") from failure
    return [result for result, _ in said]


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_whole(partial: Path, contents: Contents, runtime: Runtime) -> dict[str, Any]:
    """Writes rank 0's files: those that exist once, and its own moments."""
    written = {MODEL: contents.model, **({EMA: contents.ema} if contents.ema else {})}
    written |= {f"ema_{label}.safetensors": weights for label, weights in contents.averages.items()}
    for name, weights in written.items():
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        save_file(tensors, partial / name, metadata=dict(contents.metadata))
    torch.save(dict(contents.state), partial / STATE)
    (partial / CONFIG).write_text(contents.config, encoding="utf-8")
    facts: dict[str, Any] = {CLASSES: list(contents.classes)} if contents.classes else {}
    facts |= {NORMALIZATION: asdict(contents.normalization)} if contents.normalization is not None else {}
    for name, value in facts.items():
        (partial / name).write_text(json.dumps(value, indent=0) + "\n", encoding="utf-8")
    once = {name: _finished(partial / name) for name in (*written, STATE, CONFIG, *facts)}
    return {**once, **_write_moments(partial, contents, runtime)}


def _write_moments(partial: Path, contents: Contents, runtime: Runtime) -> dict[str, Any]:
    path = partial / f"optimizer_{runtime.rank:05d}_of_{runtime.world_size:05d}.safetensors"
    starts = {name: part.start for name, part in contents.moments.items()}
    tensors = {name: part.values.cpu().contiguous() for name, part in contents.moments.items()}
    save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    return {path.name: _finished(path)}


def _other_averages(path: Path) -> list[tuple[str, str]]:
    """Name and label of each file with a further average."""
    names = sorted(file.name for file in path.glob("ema_*.safetensors"))
    return [(name, name.removeprefix("ema_").removesuffix(".safetensors")) for name in names]


def _finished(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk. Returns its size in bytes and its hash, for the manifest."""
    # safetensors makes its files private to the user.
    path.chmod(usual_mode(path.parent))
    flush(path)
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def _publisher(partial: Path, target: Path, manifest: Mapping[str, Any]) -> Callable[[], None]:
    """A function that ends a save: after it the checkpoint exists."""

    def publish() -> None:
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        flush(partial / MANIFEST)
        flush(partial)
        replaced = _set_aside(target)
        try:
            partial.rename(target)
        except OSError:
            if replaced is not None:
                replaced.rename(target)
            raise
        flush(target.parent)

    return publish


def _own_damage(path: Path, runtime: Runtime, only: str | None) -> str | None:
    """What is wrong with the files that this rank checks."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        if wrong := _wrong_manifest(path, manifest["step"], files):
            return f"{MANIFEST} {wrong}"
        names = sorted(files) if only is None else [sampled_file(path) if only == EMA else only]
        for name in names[runtime.rank :: runtime.world_size]:
            facts = files[name]
            size = (path / name).stat().st_size
            if size != facts["size"]:
                return f"{name} has {size} bytes, wanted {facts['size']}"
            if sha256_of(path / name) != facts["sha256"]:
                return f"{name} does not have the hash of the manifest"
    except OSError as error:
        return f"{error.filename or path}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is not readable: {type(error).__name__}: {error}"
    return None


def _wrong_manifest(path: Path, step: Any, files: Mapping[str, Any]) -> str | None:
    """Why a manifest cannot be that of the checkpoint in `path`; None if it can."""
    wanted = step_in_name(path)
    if type(step) is not int or step < 0 or (wanted is not None and step != wanted):
        return f"has step {step!r}, wanted {'an int >= 0' if wanted is None else wanted}"
    # A whole run has a file of moments per rank, numbered from 0.
    moments = [match for match in map(_MOMENTS.fullmatch, files) if match]
    num_ranks = len(moments) or 1
    if any(int(match[2]) != num_ranks for match in moments):
        return f"lists {num_ranks} files of optimizer moments, of {int(moments[0][2])}"
    ranks = (f"optimizer_{rank:05d}_of_{num_ranks:05d}.safetensors" for rank in range(num_ranks))
    # Without an average there is neither the file nor its entry.
    average = {EMA} if (path / EMA).is_file() else set()
    whole = {MODEL, STATE, CONFIG, *ranks, *average}
    if missing := sorted(whole - set(files)):
        return f"does not list {', '.join(missing)}"
    for name in sorted(set(files) - whole - {EMA, CLASSES, NORMALIZATION}):
        if not _AVERAGE.fullmatch(name):
            return f"lists {name!r}, which is no file of a checkpoint"
    return None


def _remove_old(target: Path, keep_last: int, keep_every: int, kept: Collection[str]) -> None:
    folder = target.parent
    for later in (path for path in newest_first(folder) if step_of(path) > step_of(target)):
        # A later checkpoint can only be one that was damaged, so that the run resumed from an earlier one.
        # One of the same step may be there already.
        names = (later.with_suffix(f".damaged{number or ''}") for number in itertools.count())
        later.rename(next(path for path in names if not path.exists()))
    for old in newest_first(folder)[keep_last:]:
        if old.name not in kept and (not keep_every or step_of(old) % keep_every):
            _set_aside(old)
    # Also leftovers of an earlier process that was interrupted while saving or removing.
    for leftover in (*folder.glob("step_*.old"), *folder.glob("step_*.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)


def _set_aside(path: Path) -> Path | None:
    """Renames a folder before its removal, so that an interrupted one leaves nothing like a checkpoint."""
    if not path.exists():
        return None
    aside = path.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
