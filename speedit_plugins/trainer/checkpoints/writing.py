"""Writes checkpoints, whole or not at all, by all ranks together, and removes older ones."""

import itertools
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from speedit_plugins.files import flush, naming, sha256_of, usual_mode
from speedit_plugins.trainer.checkpoints.contents import (
    CLASSES,
    CONFIG,
    EMA,
    MANIFEST,
    MODEL,
    NORMALIZATION,
    STATE,
    CheckpointError,
    Contents,
)
from speedit_plugins.trainer.checkpoints.names import folder_name, newest_first, step_of
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.terminal import say


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
    target = folder / folder_name(step)
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


def _together(runtime: Runtime, target: Path, action: Callable[[], Any]) -> list[Any]:
    """What `action` returned on each rank. If it fails on one rank, all ranks raise."""
    result, failure = None, None
    try:
        result = action()
    # Every kind of error, because the other ranks wait to hear of it.
    except Exception as error:
        failure = error
    said = runtime.gather_objects((result, None if failure is None else _told(failure)))
    for rank, (_, message) in enumerate(said):
        if message is not None:
            earlier = [p for p in newest_first(target.parent) if step_of(p) < step_of(target)]
            kept = f"the last checkpoint is {earlier[0]}" if earlier else "there is no earlier checkpoint"
            where = f" on rank {rank}" if runtime.world_size > 1 else ""
            raise CheckpointError(f"cannot write checkpoint {target}{where}: {message}; {kept}") from failure
    return [result for result, _ in said]


def _told(failure: Exception) -> str:
    if isinstance(failure, OSError) and failure.filename is None and failure.strerror:
        # Without the number that Python sets before it.
        return failure.strerror
    return str(failure)


def _fresh(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_whole(partial: Path, contents: Contents, runtime: Runtime) -> dict[str, Any]:
    """Writes rank 0's files: those that exist once, and its own moments."""
    written = {MODEL: contents.model, **({EMA: contents.ema} if contents.ema else {})}
    written |= {f"ema_{label}.safetensors": weights for label, weights in contents.averages.items()}
    for name, weights in written.items():
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        with naming(partial / name):
            save_file(tensors, partial / name, metadata=dict(contents.metadata))
    with naming(partial / STATE):
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
    with naming(path):
        save_file(tensors, path, metadata={"starts": json.dumps(starts)})
    return {path.name: _finished(path)}


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
