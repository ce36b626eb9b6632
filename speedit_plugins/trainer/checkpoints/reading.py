"""Reads checkpoints, and finds what is damaged in them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from speedit_plugins.files import pickle_fault, sha256_of
from speedit_plugins.trainer.checkpoints.contents import (
    CLASSES,
    CONFIG,
    EMA,
    MANIFEST,
    MODEL,
    NORMALIZATION,
    STATE,
    CheckpointError,
    Saved,
)
from speedit_plugins.trainer.checkpoints.names import step_in_name
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.parallel.saved_moments import Moments
from speedit_plugins.trainer.terminal import say

_AVERAGE = re.compile(r"ema_[\w.+-]+\.safetensors")
_MOMENTS = re.compile(r"optimizer_(\d{5,})_of_(\d{5,})\.safetensors")


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


def _other_averages(path: Path) -> list[tuple[str, str]]:
    """Name and label of each file with a further average."""
    names = sorted(file.name for file in path.glob("ema_*.safetensors"))
    return [(name, name.removeprefix("ema_").removesuffix(".safetensors")) for name in names]


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
