"""The parts hosts train with, taken from their own files: model, diffusion object, draw, EMA.

Dims: B samples, T timesteps.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.peers.original_dit import importable, script_function, unused

GUIDED = "openai+guided-diffusion"
SPEED = "NUS-HPC-AI-Lab+SpeeD"
# From the reference's published configs. Its defaults leave sampling uniform and make weights negative.
SPEED_OPTIONS = {"weighting": "ours", "sampling": "ours", "k": 5, "lam": 0.6, "tau": 700}
SPEED_PACKAGES = ("speed", "speed.networks", "speed.networks.dit", "speed.networks.layers", "speed.diffusion")


@dataclass(frozen=True)
class HostParts:
    """One training of a host.

    Attributes: `draw` takes B and a device to timesteps (B,) there; `losses` runs the model on noised x at
    timesteps and gives the loss of each sample (B,); `update_ema` moves its first model towards its second;
    `grad_norm` is taken of all parameters before each step, None where the script takes none.
    """

    model: nn.Module
    draw: Callable[[int, torch.device | str], Tensor]
    losses: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    update_ema: Callable[[nn.Module, nn.Module], None]
    grad_norm: Callable[[list[nn.Parameter]], Tensor] | None = None


@dataclass(frozen=True)
class Host:
    """A host: its name and its checkout's folder. `build` takes that folder, a model's name and options.

    The name "DiT" is of the image hosts' model without a size: the options give it.
    """

    name: str
    checkout: str
    build: Callable[[Path, str, Mapping[str, Any]], HostParts]

    def is_in(self, hosts: Path) -> bool:
        """Whether the folder `hosts` holds its checkout."""
        return (hosts / self.checkout).is_dir()


def dit_parts(checkout: Path, name: str, options: Mapping[str, Any]) -> HostParts:
    """The parts of facebookresearch/DiT and of fast-DiT; `options` go to the model."""
    with importable(checkout):
        models = importlib.import_module("models")
        model = {**models.DiT_models, "DiT": models.DiT}[name](**options)
        diffusion = importlib.import_module("diffusion").create_diffusion(timestep_respacing="")
    return HostParts(
        model, *_of_diffusion(diffusion), update_ema=script_function(checkout / "train.py", "update_ema")
    )


def speed_parts(checkout: Path, name: str, options: Mapping[str, Any]) -> HostParts:
    """The parts of the SpeeD reference: its paired draw, and its weights on the squared error."""
    diffusion = speed_diffusion(checkout)
    with importable(checkout, bare=SPEED_PACKAGES):
        models = importlib.import_module("speed.networks.dit.dit")
        model = {**models.DiT_models, "DiT": models.DiT}[name](condition="class", **options)

    def losses(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        terms = diffusion.training_losses(model, x, t, {"y": y}, weights=diffusion.weights)
        return terms["loss"]

    update_ema = script_function(checkout / "speed" / "utils" / "train_utils.py", "update_ema")

    def draw(batch_size: int, device: torch.device | str) -> Tensor:
        return diffusion._sample_time(batch_size).to(device)

    return HostParts(model, draw, losses, update_ema)


def sit_parts(checkout: Path, name: str, options: Mapping[str, Any]) -> HostParts:
    """SiT's parts: linear path, velocity, 1 is clean. Its losses draw the times, so `draw` gives none.

    Models have DiT's names here.
    """
    with importable(checkout, instead=unused("torchdiffeq")):
        models = importlib.import_module("models")
        sizes = {size.replace("SiT", "DiT"): kind for size, kind in models.SiT_models.items()}
        model = {**sizes, "DiT": models.SiT}[name](**options)
        transport = importlib.import_module("transport").create_transport()

    def draw(batch_size: int, device: torch.device | str) -> Tensor:
        return torch.empty(0, device=device)

    def losses(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return transport.training_losses(model, x, {"y": y})["loss"]

    return HostParts(model, draw, losses, script_function(checkout / "train.py", "update_ema"))


def latte_parts(checkout: Path, name: str, options: Mapping[str, Any]) -> HostParts:
    """Vchitect/Latte's parts without classes. Its script takes the gradient norm; it clips none at first."""
    with importable(checkout, bare=("models",)):
        model = importlib.import_module("models.latte").Latte_models[name](extras=1, **options)
        diffusion = importlib.import_module("diffusion").create_diffusion(timestep_respacing="")
    clip = script_function(checkout / "utils.py", "clip_grad_norm_")
    return HostParts(
        model,
        *_of_diffusion(diffusion),
        update_ema=script_function(checkout / "utils.py", "update_ema"),
        grad_norm=partial(clip, max_norm=0.1, clip_grad=False),
    )


def speed_diffusion(checkout: Path) -> Any:
    """The SpeeD reference's diffusion object, with its published settings."""
    with importable(checkout, bare=SPEED_PACKAGES):
        kind = importlib.import_module("speed.diffusion.speed").Speed_IDDPM
        return kind(timestep_respacing="", **SPEED_OPTIONS)


def speed_draw(checkout: Path, device: torch.device | str = "cpu") -> Callable[[int], tuple[Tensor, Tensor]]:
    """The SpeeD reference's draw of B timesteps (B,), with its look-up of their weights (B,)."""
    diffusion = speed_diffusion(checkout)
    with importable(checkout, bare=SPEED_PACKAGES):
        extract = importlib.import_module("speed.diffusion.iddpm.gaussian_diffusion")._extract_into_tensor

    def draw(batch_size: int) -> tuple[Tensor, Tensor]:
        t = diffusion._sample_time(batch_size).to(device)
        return t, extract(diffusion.weights, t, (batch_size,))

    return draw


def guided_draws(
    checkout: Path, device: torch.device | str = "cpu"
) -> dict[str, Callable[[int], tuple[Tensor, Tensor]]]:
    """guided-diffusion's samplers by name: B to timesteps and weights (B,) each. The learning one is warm."""
    with importable(checkout, bare=("guided_diffusion",)):
        resample = importlib.import_module("guided_diffusion.resample")
    diffusion = SimpleNamespace(num_timesteps=1000)
    # The host uses a name that numpy no longer has.
    with mock.patch.object(np, "int", int, create=True):
        learning = resample.LossSecondMomentResampler(diffusion)
    for _ in range(learning.history_per_term):
        learning.update_with_all_losses(range(1000), [1.0] * 1000)
    samplers = {"uniform": resample.UniformSampler(diffusion), "loss-second-moment": learning}
    return {name: partial(sampler.sample, device=device) for name, sampler in samplers.items()}


def _of_diffusion(diffusion: Any) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Draw and losses of scripts that draw uniformly themselves."""

    def draw(batch_size: int, device: torch.device | str) -> Tensor:
        return torch.randint(0, diffusion.num_timesteps, (batch_size,), device=device)

    def losses(model: nn.Module, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return diffusion.training_losses(model, x, t, {"y": y})["loss"]

    return draw, losses


IMAGE_HOSTS = (
    Host("facebookresearch/DiT", "facebookresearch+DiT", dit_parts),
    Host("fast-DiT", "chuanyangjin+fast-DiT", dit_parts),
    Host("SpeeD reference", SPEED, speed_parts),
)
FLOW_HOSTS = (Host("SiT", "willisma+SiT", sit_parts),)
VIDEO_HOSTS = (Host("Latte", "Vchitect+Latte", latte_parts),)
