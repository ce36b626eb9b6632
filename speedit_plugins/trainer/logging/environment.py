"""What a run was trained with: versions, system and devices, as a file in its folder."""

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
# What changes numbers or speed; av and pillow read the data.
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


def save_environment(folder: Path, runtime: Runtime) -> None:
    """Writes `folder/environment.json`: text by name. No host or user name stands in it."""
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
    }
    if is_cuda:
        found["CUDA"] = str(torch.version.cuda)
    write_whole(folder / ENVIRONMENT, f"{json.dumps(found, indent=2)}\n".encode())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions by the packages' names; without those that are not installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
