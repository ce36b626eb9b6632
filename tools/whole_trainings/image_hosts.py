"""The unmodified train.py of DiT, fast-DiT, SiT and LightningDiT through the launcher, on random data.

The model is the smallest of the host's own. STAND_INS lists what is replaced because a CPU lacks it.

Dims: B batch, T timesteps.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import yaml
from conformance.stand_ins import StandIns
from safetensors.torch import save_file
from torch import Tensor, nn

from speedit_plugins import NoiseSchedule, launch
from whole_trainings.checks import Check, Result, fit, tenths

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = (
    "torch.cuda (present, device 'cpu')",
    "torch.compile (none)",
    "NCCL (gloo)",
    "accelerate (one process)",
    "timm (its three layers)",
    "torchvision (random images)",
    "the VAE (a mean over 8 x 8 pixels)",
    "wandb, torchdiffeq, fairscale (imported, never called)",
)
BATCH, NUM_BATCHES, LATENT_SIZE = 64, 16, 32
_UNUSED = ("torchvision", "wandb", "torchdiffeq", "fairscale")


@dataclass(frozen=True)
class Training:
    """How a host's train.py is started, and what its model sees.

    Args:
        host: name.
        marker: a text in this host's train.py that no later host of the list has.
        model: class of the model.
        arguments: returns those of the script for a checkout and a work folder, and may write data there.
        schedule: noise schedule of the policy.
        time_of: turns the t that the model sees into time in [0, 1], 1 is noise.
    """

    host: str
    marker: str
    model: str
    arguments: Callable[[Path, Path], list[str]]
    schedule: Callable[[], NoiseSchedule]
    time_of: Callable[[Tensor], Tensor]


class _CpuCount:
    """`rank % device_count()` is the CPU."""

    def __rmod__(self, rank: int) -> torch.device:
        return torch.device("cpu")


class _Accelerator:
    """accelerate's class for one process on the CPU."""

    device = torch.device("cpu")
    is_main_process = True
    num_processes = 1
    local_process_index = 0
    mixed_precision = "no"

    def __init__(self) -> None:
        # accelerate starts the process group, and some train.py rely on that.
        dist.init_process_group("gloo")

    def prepare(self, *objects: Any) -> tuple[Any, ...]:
        return objects

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class _Images(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random images in place of torchvision's ImageFolder."""

    def __init__(self, root: str, transform: object = None) -> None:
        self._colours = torch.rand(BATCH * NUM_BATCHES, 3, 1, 1) * 2 - 1

    def __len__(self) -> int:
        return len(self._colours)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._colours[index].expand(3, 8 * LATENT_SIZE, 8 * LATENT_SIZE), index % 10


class _Encoder(nn.Module):
    def encode(self, x: Tensor) -> SimpleNamespace:
        latent = nn.functional.avg_pool2d(x, 8)
        return SimpleNamespace(
            latent_dist=SimpleNamespace(sample=lambda: torch.cat([latent, latent[:, :1]], 1))
        )


@dataclass(frozen=True)
class ImageHost:
    """One of these hosts, for the table: its law is checked, in a process of its own."""

    name: str
    folder: str

    def train(self, checkout: Path, work: Path) -> Result:
        """Runs its train.py."""
        tool = ROOT / "tools" / "host_training.py"
        command = [sys.executable, str(tool), "--checkout", str(checkout), "--work", str(work)]
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"exit": 1, "draws": 0}
        result = Result(self.name, stand_ins=list(STAND_INS), commands=["train.py"])
        result.seconds = time.monotonic() - started
        words = done.stderr.strip().splitlines()[-1:] if found["exit"] else ["0"]
        result.checks["exit"] = Check(found["exit"] == 0, " ".join(words))
        fits = found["draws"] > 0 and found["worst_sigma"] < 4
        result.checks["law"] = Check(
            fits, f"{found['draws']} draws, worst tenth {found.get('worst_sigma')} sigma"
        )
        return result


def run_one(checkout: Path, work: Path, policy: str) -> int:
    """Prints the result of one host as JSON. Returns 0 if the script ran and its timesteps fit the policy."""
    script, work = checkout.resolve() / "train.py", work.resolve()
    training = training_of(script)
    work.mkdir(parents=True, exist_ok=True)
    seen: list[Tensor] = []
    code = run(training, script, policy, work, seen)
    shares = tenths(policy, training.schedule())
    fitted = fit(shares, [training.time_of(t) for t in seen])
    print(json.dumps({"host": checkout.name, "exit": code, "stand_ins": STAND_INS, **fitted}))
    return 0 if code == 0 and fitted["draws"] and fitted["worst_sigma"] < 4 else 1


def training_of(script: Path) -> Training:
    """How this train.py is started.

    Raises:
        SystemExit: it is not the script of a known host.
    """
    text = script.read_text(encoding="utf-8") if script.is_file() else ""
    known = next((training for training in TRAININGS if training.marker in text), None)
    if known is None:
        raise SystemExit(f"no train.py of {', '.join(training.host for training in TRAININGS)}: {script}")
    return known


def run(training: Training, script: Path, policy: str, work: Path, seen: list[Tensor]) -> int:
    """Runs the launcher. Returns its exit code, and adds the t (B,) of every call of the model to `seen`."""

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module).__name__ == training.model:
            seen.append(inputs[1].detach().clone())

    arguments = training.arguments(script.parent, work)
    with ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_pre_hook(record).remove)
        for replaced in _replacements():
            stack.enter_context(replaced)
        # LightningDiT writes its log into the current folder.
        stack.callback(os.chdir, Path.cwd())
        os.chdir(work)
        code = launch.main(["--policy", policy, str(script), *arguments])
        # Some scripts end their process group and some do not.
        if dist.is_initialized():
            dist.destroy_process_group()
        return code


def write_features(folder: Path) -> None:
    """Random latents and labels in the files that fast-DiT's train.py reads."""
    generator = np.random.default_rng(0)
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(BATCH * NUM_BATCHES):
        latent = generator.standard_normal((1, 4, LATENT_SIZE, LATENT_SIZE), dtype=np.float32)
        np.save(folder / "imagenet256_features" / f"{index}.npy", latent)
        np.save(folder / "imagenet256_labels" / f"{index}.npy", np.array([index % 10]))


def write_lightningdit(checkout: Path, folder: Path) -> Path:
    """Writes the host's published config, with a small model and few steps, and the latents that it names.

    Its logit-normal draw is off: in 1,000 draws it could not be told from the policy's density.
    """
    published = checkout / "configs" / "lightningdit_xl_vavae_f16d32.yaml"
    # The host's own train.py reads it in this way.
    config = yaml.safe_load(published.read_text(encoding="utf-8"))
    channels, count = config["model"]["in_chans"], BATCH * NUM_BATCHES
    config["data"].update(data_path=str(folder), image_size=16, num_classes=10, num_workers=0)
    # The smallest model with one token. A step with its 130 million weights is costly, so there are four.
    config["model"].update(model_type="LightningDiT-B/1")
    steps = {"max_steps": 4, "global_batch_size": count // 4, "log_every": 2, "ckpt_every": 1000}
    config["train"].update(steps, output_dir=str(folder / "results"), exp_name="run")
    config["transport"].update(use_lognorm=False)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, channels, 1, 1, generator=generator)
    tensors = {"latents": latents, "latents_flip": latents.clone(), "labels": torch.arange(count) % 10}
    save_file(tensors, folder / "latents.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "config.yaml"


def _replacements() -> list[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import original_dit

    layers = ModuleType("timm.models.vision_transformer")
    names = ("PatchEmbed", "Attention", "Mlp")
    vars(layers).update({name: getattr(original_dit, name) for name in names})
    timm = {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models"), layers.__name__: layers}
    accelerate, datasets = ModuleType("accelerate"), ModuleType("torchvision.datasets")
    vars(accelerate).update(Accelerator=_Accelerator)
    # SiT's own download.py imports from a module below it.
    vars(datasets).update(ImageFolder=_Images, __path__=[])
    modules = {**timm, "accelerate": accelerate, "torchvision.datasets": datasets}
    ddp, start = nn.parallel.DistributedDataParallel, dist.init_process_group
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    # SiT's train.py reads two names for wandb even if it does not use it.
    environment.update(ENTITY="none", PROJECT="none")

    def on_cpu(model: nn.Module, device_ids: object = None) -> nn.Module:
        return ddp(model)

    def with_gloo(backend: str) -> None:
        start("gloo")

    def present() -> bool:
        return True

    def uncompiled(function: Any) -> Any:
        return function

    cuda = {"is_available": present, "device_count": _CpuCount, "set_device": id, "synchronize": present}
    return [
        # This is first, since diffusers looks at what is installed when it is imported.
        mock.patch("diffusers.models.AutoencoderKL.from_pretrained", return_value=_Encoder()),
        mock.patch.dict("os.environ", environment),
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(sys, "meta_path", [*sys.meta_path, StandIns(_UNUSED)]),
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(torch, "compile", uncompiled),
        mock.patch.object(nn.parallel, "DistributedDataParallel", on_cpu),
        mock.patch.object(dist, "init_process_group", with_gloo),
    ]


def _image_arguments(model: str, checkout: Path, work: Path) -> list[str]:
    arguments = ["--data-path", str(work), "--results-dir", str(work / "results"), "--model", model]
    arguments += ["--image-size", "256", "--num-classes", "10", "--epochs", "1", "--num-workers", "0"]
    return [*arguments, "--global-batch-size", str(BATCH), "--log-every", "8", "--ckpt-every", "1000"]


def _feature_arguments(checkout: Path, work: Path) -> list[str]:
    write_features(work)
    return ["--feature-path", *_image_arguments("DiT-S/8", checkout, work)[1:]]


def _config_arguments(checkout: Path, work: Path) -> list[str]:
    return ["--config", str(write_lightningdit(checkout, work))]


def _middle(t: Tensor) -> Tensor:
    return (t + 0.5) / 1000


def _flipped(t: Tensor) -> Tensor:
    # A transport has noise at 0.
    return 1 - t


TRAININGS = (
    Training(
        "LightningDiT",
        "LightningDiT_models",
        "LightningDiT",
        _config_arguments,
        NoiseSchedule.rectified_flow,
        _flipped,
    ),
    Training(
        "SiT",
        "SiT_models",
        "SiT",
        partial(_image_arguments, "SiT-S/8"),
        NoiseSchedule.rectified_flow,
        _flipped,
    ),
    Training("fast-DiT", "--feature-path", "DiT", _feature_arguments, NoiseSchedule.linear, _middle),
    Training("DiT", "DiT_models", "DiT", partial(_image_arguments, "DiT-S/8"), NoiseSchedule.linear, _middle),
)

HOSTS = (
    ImageHost("DiT", "facebookresearch+DiT"),
    ImageHost("fast-DiT", "chuanyangjin+fast-DiT"),
    ImageHost("SiT", "willisma+SiT"),
    ImageHost("LightningDiT", "hustvl+LightningDiT"),
)
