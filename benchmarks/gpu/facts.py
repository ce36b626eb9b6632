"""The card, its driver, and the versions of what runs on it."""

import contextlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from benchmarks.gpu.job import Job
from speedit_plugins.trainer.logging.environment import versions

PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "colossalai", "bitsandbytes", "pytest")


def describe_device(job: Job) -> None:
    """Says name, memory and driver of the device, and the versions; SystemExit without the device."""
    found = {
        "CPU": f"{os.cpu_count()} cores, {platform.machine()}",
        "Python": platform.python_version(),
        **versions(PACKAGES),
    }
    if job.device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("--device cuda needs a CUDA device, and torch sees none")
        facts = torch.cuda.get_device_properties(0)
        found = {
            "card": f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB, {facts.multi_processor_count} SMs",
            "compute capability": f"{facts.major}.{facts.minor}",
            "driver, power limit, highest clock": driver(),
            "cards that torch sees": str(torch.cuda.device_count()),
            "CUDA of torch": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            **found,
        }
    rows = "\n".join(f"| {name} | {value} |" for name, value in found.items())
    job.say(f"| | |\n|---|---|\n{rows}", found)


def driver() -> str:
    """What nvidia-smi says of the first card; without it what the kernel's driver says, or "unknown"."""
    program = shutil.which("nvidia-smi")
    if program is not None:
        query = ["--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader", "--id=0"]
        done = subprocess.run([program, *query], capture_output=True, text=True, check=False)  # noqa: S603 - fixed words
        if done.returncode == 0:
            return done.stdout.strip()
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    return "unknown"
