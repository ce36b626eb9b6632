"""Runs the unmodified train.py of a DiT or fast-DiT checkout through the launcher, on the CPU.

    python tools/host_training.py --checkout DIR/facebookresearch+DiT --work EMPTY_DIR [--policy speedit]

The data are random; the model is the host's DiT-S/8. What a CPU lacks is replaced, and listed in STAND_INS.
Prints, as JSON, the launcher's exit code and how the t that the model saw fit the policy's density.

Dims: B batch.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from host_stand_ins import StandIns
from torch import Tensor, nn

from speedit_plugins import NoiseSchedule, build_policy, launch

ROOT = Path(__file__).resolve().parents[1]
STAND_INS = (
    "torch.cuda (present, device 'cpu')",
    "NCCL (gloo)",
    "accelerate (one process)",
    "timm (its three layers)",
    "torchvision (random images)",
    "the VAE (a mean over 8 x 8 pixels)",
)
BATCH, NUM_BATCHES, LATENT_SIZE = 64, 24, 32


class _CpuCount:
    """`rank % device_count()` is the CPU."""

    def __rmod__(self, rank: int) -> torch.device:
        return torch.device("cpu")


class _Accelerator:
    """accelerate's, for one process on the CPU."""

    device = torch.device("cpu")
    is_main_process = True
    num_processes = 1

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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 where the script ran and its timesteps follow the policy."""
    parser = argparse.ArgumentParser(prog="host_training", description="A host's train.py, on the CPU.")
    parser.add_argument("--checkout", type=Path, required=True, help="of DiT or fast-DiT")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and results")
    parser.add_argument("--policy", default="speedit")
    args = parser.parse_args(argv)
    arguments = ["--results-dir", str(args.work / "results"), "--model", "DiT-S/8", "--image-size", "256"]
    arguments += ["--num-classes", "10", "--epochs", "1", "--global-batch-size", str(BATCH)]
    arguments += ["--num-workers", "0", "--log-every", "8", "--ckpt-every", "1000"]
    # fast-DiT trains on features that another of its scripts writes.
    is_fast = "--feature-path" in (args.checkout / "train.py").read_text(encoding="utf-8")
    arguments += ["--feature-path" if is_fast else "--data-path", str(args.work)]
    write_features(args.work)
    seen: list[Tensor] = []
    code = run(args.checkout / "train.py", args.policy, arguments, seen)
    result = {"host": args.checkout.name, "exit": code, "stand_ins": STAND_INS, **fit(args.policy, seen)}
    print(json.dumps(result))
    return 0 if code == 0 and result["draws"] and result["worst_sigma"] < 4 else 1


def run(script: Path, policy: str, arguments: Sequence[str], seen: list[Tensor]) -> int:
    """The launcher's exit code; the t (B,) of every call of the host's model are added to `seen`."""

    def record(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if type(module).__name__ == "DiT":
            seen.append(inputs[1].detach().clone())

    hook = nn.modules.module.register_module_forward_pre_hook(record)
    try:
        with ExitStack() as stack:
            for replaced in _replacements():
                stack.enter_context(replaced)
            return launch.main(["--policy", policy, str(script), *arguments])
    finally:
        hook.remove()


def write_features(folder: Path) -> None:
    """Random latents and labels in the files that fast-DiT's train.py reads."""
    generator = np.random.default_rng(0)
    for name in ("imagenet256_features", "imagenet256_labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(BATCH * NUM_BATCHES):
        latent = generator.standard_normal((1, 4, LATENT_SIZE, LATENT_SIZE), dtype=np.float32)
        np.save(folder / "imagenet256_features" / f"{index}.npy", latent)
        np.save(folder / "imagenet256_labels" / f"{index}.npy", np.array([index % 10]))


def fit(policy: str, seen: Sequence[Tensor]) -> dict[str, Any]:
    """How far the share of draws in each tenth of the schedule is from the policy's, in binomial sigmas."""
    if not seen:
        return {"draws": 0, "worst_sigma": float("inf")}
    t = torch.cat(list(seen))
    density = build_policy(policy, NoiseSchedule.linear()).density_for(BATCH)
    expected = density.view(10, -1).sum(1)
    shares = torch.bincount(t // 100, minlength=10) / len(t)
    sigma = (expected * (1 - expected) / len(t)).sqrt()
    return {"draws": len(t), "worst_sigma": round(float(((shares - expected) / sigma).abs().max()), 2)}


def _replacements() -> list[Any]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import original_dit

    layers = ModuleType("timm.models.vision_transformer")
    names = ("PatchEmbed", "Attention", "Mlp")
    vars(layers).update({name: getattr(original_dit, name) for name in names})
    timm = {"timm": ModuleType("timm"), "timm.models": ModuleType("timm.models"), layers.__name__: layers}
    accelerate, datasets = ModuleType("accelerate"), ModuleType("torchvision.datasets")
    vars(accelerate).update(Accelerator=_Accelerator)
    vars(datasets).update(ImageFolder=_Images)
    modules = {**timm, "accelerate": accelerate, "torchvision.datasets": datasets}
    ddp, start = nn.parallel.DistributedDataParallel, dist.init_process_group
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

    def on_cpu(model: nn.Module, device_ids: object = None) -> nn.Module:
        return ddp(model)

    def with_gloo(backend: str) -> None:
        start("gloo")

    def present() -> bool:
        return True

    cuda = {"is_available": present, "device_count": _CpuCount, "set_device": id, "synchronize": present}
    return [
        # First: diffusers looks at what is installed while it is imported.
        mock.patch("diffusers.models.AutoencoderKL.from_pretrained", return_value=_Encoder()),
        mock.patch.dict("os.environ", environment),
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(sys, "meta_path", [*sys.meta_path, StandIns(["torchvision"])]),
        mock.patch.multiple(torch.cuda, **cuda),
        mock.patch.object(nn.parallel, "DistributedDataParallel", on_cpu),
        mock.patch.object(dist, "init_process_group", with_gloo),
    ]


if __name__ == "__main__":
    sys.exit(main())
