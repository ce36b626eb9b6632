"""Checkpoints: folders that exist whole or not at all.

`checkpoints/step_0000100/` holds model.safetensors and ema.safetensors (the weights), state.pt (optimizer,
RNG, data position, policy: plain values and tensors) and config.yaml.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL, EMA, STATE, CONFIG = "model.safetensors", "ema.safetensors", "state.pt", "config.yaml"
_NAME = re.compile(r"step_(\d{7,})")


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message names it and the last good one."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Args:
        model: state dict of the model.
        ema: the same with averaged weights.
        state: plain values and tensors, at any depth.
        config: the run's config as YAML text.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    state: Mapping[str, Any]
    config: str


def save(folder: Path, step: int, contents: Contents, *, keep_last: int) -> Path:
    """Writes `folder/step_<step>` and removes all but the newest `keep_last` (>= 1) checkpoints.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: disk full, folder not writable; earlier checkpoints are as before.
    """
    target = folder / f"step_{step:07d}"
    partial = target.with_suffix(".tmp")
    try:
        with _removed_on_error(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in contents.model.items()}, partial / MODEL)
            save_file({k: v.detach().cpu().contiguous() for k, v in contents.ema.items()}, partial / EMA)
            torch.save(dict(contents.state), partial / STATE)
            (partial / CONFIG).write_text(contents.config, encoding="utf-8")
            for path in (*partial.iterdir(), partial):
                _sync(path)
            replaced = _set_aside(target)
            try:
                partial.rename(target)
            except OSError:
                if replaced is not None:
                    replaced.rename(target)
                raise
            _sync(folder)
    # torch reports a failed write as RuntimeError, safetensors as its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        last = newest(folder)
        kept = f"the last checkpoint is {last}" if last else "there is no earlier checkpoint"
        raise CheckpointError(f"cannot write checkpoint {target}: {error}; {kept}") from error
    for old in _all(folder)[:-keep_last]:
        _set_aside(old)
    # Also what an interrupted save or removal of an earlier process left behind.
    for leftover in (*folder.glob("step_*.old"), *folder.glob("step_*.tmp")):
        shutil.rmtree(leftover, ignore_errors=True)
    return target


def load(path: Path) -> Contents:
    """Reads the checkpoint folder `path`.

    Raises:
        CheckpointError: no such folder, a file is missing or damaged.
    """
    missing = [name for name in (MODEL, EMA, STATE, CONFIG) if not (path / name).is_file()]
    if missing:
        what = f"lacks {', '.join(missing)}" if path.is_dir() else "is not a folder"
        raise CheckpointError(f"no checkpoint to read: {path} {what}")
    try:
        return Contents(
            model=load_file(path / MODEL),
            ema=load_file(path / EMA),
            state=torch.load(path / STATE, map_location="cpu", weights_only=True),
            config=(path / CONFIG).read_text(encoding="utf-8"),
        )
    # A cut file can fail in any layer: zip, pickle, safetensors, text decoding.
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step in `folder`; None where there is none."""
    found = _all(folder)
    return found[-1] if found else None


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"a checkpoint folder is named step_<number>, got {path}")
    return int(match[1])


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def _set_aside(path: Path) -> Path | None:
    """Renames a folder to be removed: a removal cut short must not leave what looks like a checkpoint."""
    if not path.exists():
        return None
    aside = path.with_suffix(".old")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _removed_on_error(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
