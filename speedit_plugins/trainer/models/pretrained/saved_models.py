"""Saved models of diffusers and transformers: read without the network, with a fault told in one line."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from speedit_plugins.trainer.models.weights import check_finite, contents_of
from speedit_plugins.trainer.weight_files import unlike_weights

# What the two libraries raise for a model that is not there, or is another one.
_FAULTS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    TypeError,
    AttributeError,
    ImportError,
    SafetensorError,
)
_MAX_REASON = 300


@contextmanager
def reading(what: str, path: str, *subfolders: str, allow_download: bool) -> Iterator[str]:
    """Gives the path for `from_pretrained`, ~ as the home folder; the block reads the model.

    Without `allow_download` the block opens no connection. The libraries' own `local_files_only` leaves one:
    huggingface_hub asks its server which agents there are.

    Args:
        what: the start of the message, such as "no AutoencoderKL in safetensors form".
        path: a folder or a hub name.
        subfolders: folders of the model inside `path`, "" for none.
        allow_download: lets the libraries fetch a hub name.

    Raises:
        ValueError: the block cannot read the model. The message says what is wrong with which file or folder,
            what the folder has, or how to get the weights.
    """
    found = os.path.expanduser(path)
    try:
        with _online(allow_download):
            if not allow_download and not os.path.isdir(found):
                found = _cached(path)
            yield found
    except _FAULTS as error:
        raise ValueError(
            f"{what} at '{path}': {_why(Path(found), subfolders, error, allow_download)}"
        ) from error


def check_whole(model: nn.Module, info: Mapping[str, Any], path: str) -> None:
    """Nothing, if a file had every weight of a model, and all are finite.

    Args:
        model: what `from_pretrained` gave.
        info: what it gave beside it, for `output_loading_info`.
        path: where it was read.

    Raises:
        ValueError: weights are missing, which the libraries draw at random, or are not finite.
    """
    # No output here depends on BERT's pooler, and checkpoints of some models have none.
    missing = sorted(name for name in info["missing_keys"] if "pooler" not in name)
    if missing:
        raise ValueError(
            f"'{path}' lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}; wanted a"
            " whole model"
        )
    check_finite(dict(model.named_parameters()), path)


@contextmanager
def _online(is_allowed: bool) -> Iterator[None]:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    # Read at each request, as the documented environment variable is not after the package's import.
    constants.HF_HUB_OFFLINE = before or not is_allowed
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _cached(name: str) -> str:
    """The folder of a hub name in the local cache. By name, a pipeline's tokenizer is not found in it."""
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, local_files_only=True))


def _why(path: Path, subfolders: tuple[str, ...], error: Exception, allow_download: bool) -> str:
    if path.is_dir():
        return _fault_in(path, subfolders) or _reason(error)
    if path.is_file():
        return "it is a file; wanted the folder of a saved model"
    # A hub name is "name" or "owner/name".
    if path.is_absolute() or str(path).startswith(".") or len(path.parts) > 2:
        return "there is no such folder; give the folder of a saved model, or a hub name"
    if allow_download:
        return f"{_reason(error)}; check the name and the network"
    return (
        "no such folder, and no such model in the local cache; give the folder of a saved model, or set"
        " allow_download: true to fetch a hub name"
    )


def _fault_in(path: Path, subfolders: tuple[str, ...]) -> str:
    """What is wrong with the files of a model, "" if it is none of the usual faults.

    Args:
        path: an existing folder.
        subfolders: of the model, and perhaps of its tokenizer.
    """
    for number, name in enumerate(subfolders):
        folder = path / name if name else path
        if not folder.is_dir():
            return f"it has no folder {name!r}, but {contents_of(path)}; wanted one of them as the subfolder"
        if number:
            break  # A tokenizer has no weights.
        for file in sorted(folder.glob("*.safetensors")):
            if fault := unlike_weights(file):
                return f"{file} {fault}"
        if not (folder / "config.json").is_file():
            return (
                f"{folder} has no config.json, but {contents_of(folder)}; wanted the folder of a saved model,"
                " or the subfolder of one in a pipeline"
            )
        if not any(folder.glob("*.safetensors")):
            return f"{folder} has no file in safetensors form, but {contents_of(folder)}"
    return ""


def _reason(error: Exception) -> str:
    """The words of a library's error in one line."""
    return " ".join(str(error).split())[:_MAX_REASON].rstrip(".") or type(error).__name__
