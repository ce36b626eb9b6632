"""Reads the weights of checkpoint files, and copies them into a model."""

import argparse
import collections
import logging
import pickle
import re
import typing
import warnings
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
from speedit_plugins.trainer.models.state_dicts import SET_KEYS, WEIGHT_SETS, weights_in
from speedit_plugins.trainer.models.training_only import without_layers
from speedit_plugins.trainer.saved_configs import named_config
from speedit_plugins.trainer.weight_files import unlike_weights

__all__ = [
    "WEIGHT_SETS",
    "LoadReport",
    "check_file",
    "check_finite",
    "contents_of",
    "first_line",
    "fit_weights",
    "load_weights",
    "read_checkpoint",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, by the names of parameters and buffers."""

    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    """Names of the model that the file lacks, or has with another shape."""
    unused: tuple[str, ...]
    """Names of the file that the model lacks, or has with another shape."""


def load_weights(
    model: nn.Module, path: str | Path, *, prefer: str | None = None, allow_mismatch: Sequence[str] = ()
) -> LoadReport:
    """Copies the weights of a checkpoint into a model, which keeps its own dtype and device.

    Args:
        model: its parameters must have memory, so it is not on the meta device.
        path: as in `read_checkpoint`.
        prefer: as in `read_checkpoint`.
        allow_mismatch: prefixes of names that may differ: "y_embedder." to fine-tune on other classes.

    Raises:
        ValueError: the file cannot be read; names or shapes differ that no prefix allows (the message lists
            them, and nothing is copied); a weight is not finite; or no name starts with one of the prefixes.
    """
    return fit_weights(model, read_checkpoint(path, prefer=prefer), path, allow_mismatch=allow_mismatch)


def fit_weights(
    model: nn.Module, found: Mapping[str, Tensor], path: str | Path, *, allow_mismatch: Sequence[str] = ()
) -> LoadReport:
    """As `load_weights`, with weights that were read already.

    Args:
        model: see `load_weights`.
        found: what `read_checkpoint` gave.
        path: names the file in messages.
        allow_mismatch: see `load_weights`.

    Raises:
        ValueError: see `load_weights`.
    """
    wanted = model.state_dict()
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
        beside = named_config(Path(path))
        raise ValueError(
            f"'{path}' does not fit the model: {'; '.join(listed)}{rest}; wanted the model section of the run"
            f" that wrote the file{'' if beside is None else f': -c {beside}'}"
        )
    taken = {name: found[name] for name in loaded}
    # A model of someone else's may have a mask of -inf as a buffer.
    learned = {name for name, _ in model.named_parameters()}
    check_finite(
        {name: taken[name] for name in loaded if name in learned or wanted[name].isfinite().all()}, path
    )
    model.load_state_dict(taken, strict=False)
    return LoadReport(tuple(loaded), tuple(left_at_init), tuple(unused))


def read_checkpoint(path: str | Path, *, prefer: str | None = None) -> dict[str, Tensor]:
    """The weights in a file by name, on the CPU.

    Layers that only a training uses are left out, and so are the prefixes "module." and "_orig_mod." of
    DistributedDataParallel and torch.compile, and "model." where all names have it. A line is logged if a
    file has several sets of weights, or not the averaged ones, and says which were taken.

    Args:
        path: a .safetensors file, or a file of `torch.save` with a state dict or with a training checkpoint:
            a dict with weights under "ema", "model", "state_dict" or what else `state_dicts.SET_KEYS` knows.
            Code that is pickled in the file is not run.
        prefer: "ema" or "model", the weights to take from a training checkpoint. None takes the averaged ones
            if there are any. Other files have one set.

    Raises:
        ValueError: the file does not exist, is damaged, contains more than weights and plain settings, or
            lacks the preferred weights.
    """
    if prefer is not None and prefer not in WEIGHT_SETS:
        raise ValueError(
            f"prefer needs one of {', '.join(WEIGHT_SETS)}, got {prefer!r}{nearest(prefer, WEIGHT_SETS)}"
        )
    path = Path(path)
    check_file(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    try:
        weights, keys = weights_in(content, prefer)
    except ValueError as error:
        raise ValueError(f"'{path}' {error}") from None
    if prefer is None and keys not in ("", WEIGHT_SETS[0]):
        averaged = "" if keys.partition(".")[0] in SET_KEYS["ema"] else "; it has no averaged ones"
        _log.warning("'%s': the weights under %r are taken%s", path, keys, averaged)
    return without_layers(weights)


def check_file(path: Path) -> None:
    """Nothing, if a file may have weights.

    Raises:
        ValueError: there is no such file, or it is empty, cut, a web page, a pointer of git-LFS or another
            kind of file. A folder's message lists the weights in it.
    """
    if path.is_dir():
        raise ValueError(f"no checkpoint at '{path}': not a file but a folder with {contents_of(path)}")
    if not path.is_file():
        raise ValueError(f"no checkpoint at '{path}': not a file; {_beside(path)}")
    if fault := unlike_weights(path):
        raise ValueError(f"'{path}' {fault}")


def contents_of(folder: Path, limit: int = 8) -> str:
    """The names in a folder that are not hidden, for a message: "config.json, unet/", or "nothing in it"."""
    found = [path for path in folder.iterdir() if not path.name.startswith(".")]
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in found)
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{', '.join(names[:limit])}{rest}" if names else "nothing in it"


def check_finite(weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Nothing, if every weight is finite.

    Raises:
        ValueError: a tensor has a NaN or infinity; the message has its name and the number of such tensors.
    """
    bad = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if bad:
        raise ValueError(
            f"'{source}' has weights that are not finite in {len(bad)} of {len(weights)} tensors, such as"
            f" {bad[0]}: the training that wrote it diverged; wanted an earlier checkpoint"
        )


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _beside(path: Path) -> str:
    """What there is in place of a file that is missing."""
    folder = path.parent
    return f"'{folder}' has {contents_of(folder)}" if folder.is_dir() else f"there is no folder '{folder}'"


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged or not a safetensors file: {first_line(error)}") from error


def _unpickle(path: Path) -> Any:
    """Reads a file of `torch.save` with tensors, plain values, Namespace and OmegaConf objects alone."""
    with torch.serialization.safe_globals(_settings_classes()), warnings.catch_warnings():
        # torch warns about the protocol of a pickle that it then refuses.
        warnings.simplefilter("ignore", UserWarning)
        try:
            # With mmap the optimizer state of a training checkpoint is never read from disk.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            # torch's own message advises to run the code of the file.
            if foreign := _foreign_classes(path, error):
                raise ValueError(
                    f"'{path}' is refused: it asks for {foreign}, neither a tensor nor a plain setting;"
                    " loading it could run any code; wanted the weights alone, as"
                    " safetensors.torch.save_file(model.state_dict(), FILE) writes them"
                ) from None
            raise ValueError(f"'{path}' is damaged or not a file of torch.save") from None
        except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
            raise ValueError(
                f"'{path}' is damaged or not a file of torch.save: {first_line(error)}"
            ) from error


def _foreign_classes(path: Path, error: pickle.UnpicklingError) -> str:
    """Names of the classes and functions that a pickle asks for, at most three; "" if none is known."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    try:
        found = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError):
        # It reads zip files alone.
        found = []
    found = list(dict.fromkeys([*([named[1]] if named else []), *found]))
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


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
