"""Reads the weights of checkpoint files, and copies them into a model."""

import argparse
import collections
import pickle
import re
import typing
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from speedit_plugins.registry import nearest

# Where a training checkpoint of facebookresearch/DiT or SpeeDiT keeps its two sets of weights.
WEIGHT_SETS = ("ema", "model")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, by the names of parameters and buffers."""

    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    """Names of the model that the file lacks, or has with another shape."""
    unused: tuple[str, ...]
    """Names of the file that the model lacks, or has with another shape."""


def load_weights(
    model: nn.Module, path: str | Path, *, prefer: str = "ema", allow_mismatch: Sequence[str] = ()
) -> LoadReport:
    """Copies the weights of a checkpoint into a model, which keeps its own dtype and device.

    Args:
        model: its parameters must have memory, so it is not on the meta device.
        path: as in `read_checkpoint`.
        prefer: as in `read_checkpoint`.
        allow_mismatch: prefixes of names that may differ: "y_embedder." to fine-tune on other classes.

    Raises:
        ValueError: the file cannot be read; names or shapes differ that no prefix allows (the message lists
            them, and nothing is copied); or no name starts with one of the prefixes.
    """
    wanted, found = model.state_dict(), read_checkpoint(path, prefer=prefer)
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            "load_weights got a model on the meta device; wanted one with memory: model.to_empty(device=...)"
        )
    _check_prefixes(allow_mismatch, wanted, found)
    loaded = [name for name in wanted if name in found and found[name].shape == wanted[name].shape]
    left_at_init = [name for name in wanted if name not in loaded]
    unused = [name for name in found if name not in loaded]
    excused = tuple(allow_mismatch)
    faults = [name for name in dict.fromkeys((*left_at_init, *unused)) if not name.startswith(excused)]
    if faults:
        listed = [f"{name}: {_shape(found, name)}, wanted {_shape(wanted, name)}" for name in faults[:3]]
        rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"'{path}' does not fit the model: {'; '.join(listed)}{rest}; wanted the model section of the run"
            " that wrote the file (see config.yaml next to the checkpoint)"
        )
    model.load_state_dict({name: found[name] for name in loaded}, strict=False)
    return LoadReport(tuple(loaded), tuple(left_at_init), tuple(unused))


def read_checkpoint(path: str | Path, *, prefer: str = "ema") -> dict[str, Tensor]:
    """The weights in a file by name, on the CPU.

    Args:
        path: a .safetensors file, or a file of `torch.save` with a state dict or with a training checkpoint
            of facebookresearch/DiT or SpeeDiT (a dict with "model", "ema", "opt", "args"). Code that is
            pickled in the file is not run.
        prefer: "ema" or "model", the weights to take from a training checkpoint. Other files have one set.

    Raises:
        ValueError: the file does not exist, is damaged, contains more than weights and plain settings, or
            lacks the preferred weights.
    """
    if prefer not in WEIGHT_SETS:
        raise ValueError(
            f"prefer needs one of {', '.join(WEIGHT_SETS)}, got {prefer!r}{nearest(prefer, WEIGHT_SETS)}"
        )
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at '{path}': not a file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"'{path}' is damaged or not a safetensors file: {first_line(error)}") from error
    content = _unpickle(path)
    if isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in WEIGHT_SETS):
        if not isinstance(content.get(prefer), Mapping):
            raise ValueError(f"'{path}' has no {prefer!r} weights, got keys {sorted(map(str, content))}")
        content = content[prefer]
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        what = (
            f"keys {sorted(map(str, content))[:8]}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise ValueError(
            f"'{path}' contains {what}, wanted a state dict, or a dict with one under 'ema' or 'model'"
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def loading_advice(allow_download: bool) -> str:
    """Advice for an error message, after a library found no saved model."""
    if allow_download:
        return "check the name and the network"
    return "give the folder of a saved model, or set allow_download: true to fetch a hub name"


def _unpickle(path: Path) -> Any:
    """Reads a file of `torch.save` with tensors, plain values, Namespace and OmegaConf objects alone."""
    try:
        with torch.serialization.safe_globals(_settings_classes()):
            # With mmap the optimizer state of a training checkpoint is never read from disk.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is not None:
            raise ValueError(
                f"'{path}' is refused: it asks for {name[1]}, neither a tensor nor a plain setting;"
                " loading it could run any code"
            ) from error
        raise ValueError(f"'{path}' is refused or damaged: {first_line(error)}") from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged or not a file of torch.save: {first_line(error)}") from error


def _settings_classes() -> list[Any]:
    """Classes that training scripts pickle their settings in. Loading them has no side effects."""
    classes: list[Any] = [argparse.Namespace]
    try:
        from omegaconf import DictConfig, ListConfig, base, nodes
    except ImportError:
        return classes
    scalars = (
        nodes.AnyNode,
        nodes.StringNode,
        nodes.IntegerNode,
        nodes.FloatNode,
        nodes.BooleanNode,
        nodes.BytesNode,
    )
    # A container of OmegaConf pickles the types of its elements too.
    types = (typing.Any, dict, list, tuple, int, float, bool, str, bytes, collections.defaultdict)
    return [*classes, DictConfig, ListConfig, base.ContainerMetadata, base.Metadata, *scalars, *types]


def _check_prefixes(
    prefixes: Sequence[str], wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for a prefix that no name starts with: such an option would have no effect."""
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in (*wanted, *found)):
            known = sorted({name.split(".")[0] for name in wanted})
            raise ValueError(
                f"no parameter's name starts with {prefix!r} of allow_mismatch{nearest(prefix, known)};"
                f" names start with: {', '.join(known)}"
            )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"
