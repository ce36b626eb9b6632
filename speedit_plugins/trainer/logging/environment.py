"""Writes the versions, system and devices of a training into its folder."""

import contextlib
import json
import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import torch

from speedit_plugins.files import write_whole
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.version import __version__

ENVIRONMENT = "environment.json"
# Packages that change numbers or speed. av and pillow read the data.
_PACKAGES = (
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "colossalai",
    "peft",
    "xformers",
    "av",
    "pillow",
)


def save_environment(folder: Path, runtime: Runtime, *, linear_layers: str = "torch's products") -> None:
    """Writes `folder/environment.json`: text by name. It holds no host or user name.

    Args:
        linear_layers: which kernels compute them, see `training/products/choice.py`.
    """
    device = runtime.device
    is_cuda = device.type == "cuda"
    found = {
        "speedit-plugins": __version__,
        "python": platform.python_version(),
        **versions(_PACKAGES),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if is_cuda else f"{os.cpu_count()} CPU cores",
        "processes": str(runtime.world_size),
        "threads": str(torch.get_num_threads()),
        "linear layers": linear_layers,
    }
    if is_cuda:
        found["CUDA"] = str(torch.version.cuda)
    write_whole(folder / ENVIRONMENT, f"{json.dumps(found, indent=2)}\n".encode())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of the installed ones among these packages, by name."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
