"""The peers of benchmarks/race, from their checkouts: DiT, fast-DiT, SpeeD, MDT, SiT, REPA, LightningDiT.

Model, losses, update of the average and settings are the peer's own, with its defaults: of its training
script, or of the config that its README names. What is changed is said at each peer. All of them train on
pixels here, where their scripts encode images or read encoded ones.

Dims: B samples, C channels, H x W pixels, N tokens, D features of the teacher.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.flow.spaces import feature_maps
from benchmarks.image_sets import ImageSet
from benchmarks.peers.original_dit import importable, script_function, unused
from benchmarks.peers.training import FLOW_HOSTS, IMAGE_HOSTS, Host, sit_parts
from benchmarks.race.mdt import ADAN, MDT, MdtTraining, mdt_model
from benchmarks.race.training import Net, Script, ScriptTraining, Terms, Training, count_parameters
from speedit_plugins.trainer.diffusion.flow import TIMESTEP_SCALE
from speedit_plugins.trainer.evaluation.networks import EfficientNetLite0

# The learning rate in the scripts of DiT, fast-DiT, SpeeD, SiT and REPA; LightningDiT's config has its own.
LR = 1e-4
LIGHTNING_LR = 2e-4
# A width within this share of the wanted number of parameters is kept.
CLOSE = 0.03
# The teacher's map has a cell for so many pixels of its side, and 80 channels.
TEACHER_STRIDE, TEACHER_WIDTH = 16, 80

SIT, REPA, LIGHTNING = FLOW_HOSTS[0].checkout, "sihyun-yu+REPA", "hustvl+LightningDiT"


@dataclass(frozen=True)
class Peer:
    """A peer: its name, the folders of its checkouts, its model of a size, and its training."""

    name: str
    checkouts: tuple[str, ...]
    model: Callable[[Path, Net], nn.Module]
    train: Callable[[Path, Net, ImageSet, Terms], Training]
    training_only: str = ""

    def missing(self, hosts: Path) -> list[str]:
        """Its checkouts that the folder `hosts` lacks."""
        return [name for name in self.checkouts if not (hosts / name).is_dir()]

    def matched(self, hosts: Path, net: Net, num_parameters: int) -> Net:
        """The net with the width at which the peer's model has about so many parameters.

        Heads keep a multiple of 4 channels, as rotary positions need. Training-only parts do not count.
        """

        def miss(width: int) -> float:
            model = self.model(hosts, replace(net, width=width))
            return abs(count_parameters(model, self.training_only)[0] / num_parameters - 1)

        if miss(net.width) <= CLOSE:
            return net
        unit = 4 * net.num_heads
        return replace(net, width=min((net.width + unit * k for k in range(-4, 3)), key=miss))


def _of_script(
    name: str, checkout: str, build: Callable[[Path, Net, str], Script], training_only: str = ""
) -> Peer:
    def model(hosts: Path, net: Net) -> nn.Module:
        return build(hosts / checkout, net, "cpu").model

    def train(hosts: Path, net: Net, data: ImageSet, terms: Terms) -> Training:
        torch.manual_seed(terms.seed)
        return ScriptTraining(build(hosts / checkout, net, terms.device), data, terms)

    return Peer(name, (checkout,), model, train, training_only)


def _dit_script(host: Host, checkout: Path, net: Net, device: str) -> Script:
    """DiT's loop. Those of fast-DiT and SpeeD differ in model, draw and weights."""
    parts = host.build(checkout, "DiT", model_options(net))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return parts.losses(model, x, parts.draw(len(x), x.device), y).mean()

    def denoise(model: nn.Module, x: Tensor, timestep: Tensor, labels: Any) -> Tensor:
        return model(x, timestep, labels)

    return Script(parts.model, loss, adamw(), LR, parts.update_ema, denoise, is_flow=False)


def _sit_script(checkout: Path, net: Net, device: str) -> Script:
    """SiT's loop: linear path, velocity, uniform times, 1 is clean."""
    parts = sit_parts(checkout, "DiT", model_options(net))

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return parts.losses(model, x, parts.draw(len(x), x.device), y).mean()

    return Script(parts.model, loss, adamw(), LR, parts.update_ema, _denoise_from_noise, is_flow=True)


def _repa_script(checkout: Path, net: Net, device: str) -> Script:
    """REPA's loop: SiT's path with 0 as clean, and the teacher's features of each batch.

    The teacher is the embedded ImageNet network in place of DINOv2. It sees the images enlarged so that its
    map has a cell for each token. The projector is as narrow, and its layer as early, as in SiT-XL.
    """
    with importable(checkout, bare=("models",)):
        model = importlib.import_module("models.sit").SiT(
            **model_options(net),
            decoder_hidden_size=net.width,
            # 2048 of 1152 channels, and layer 8 of 28, in the published SiT-XL.
            projector_dim=2 * net.width,
            encoder_depth=max(1, round(net.depth * 8 / 28)),
            z_dims=[TEACHER_WIDTH],
            use_cfg=True,
            fused_attn=True,
            qk_norm=False,
        )
        silo = importlib.import_module("loss").SILoss(prediction="v", path_type="linear", weighting="uniform")
    teacher = Teacher(net.grid, device)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        denoising, projection = silo(model, x, {"y": y}, zs=[teacher(x)])
        return denoising.mean() + 0.5 * projection.mean()

    def denoise(model: nn.Module, x: Tensor, timestep: Tensor, labels: Any) -> Tensor:
        return model(x, timestep / TIMESTEP_SCALE, labels)[0]

    update_ema = script_function(checkout / "train.py", "update_ema")
    return Script(
        model,
        loss,
        adamw(),
        LR,
        update_ema,
        denoise,
        is_flow=True,
        max_grad_norm=1.0,
        training_only="projectors.",
    )


def _lightning_script(checkout: Path, net: Net, device: str) -> Script:
    """LightningDiT's loop with its published config, compiled as its code says.

    The cosine between velocities is taken over channels; with a single channel it has no gradient.
    """
    absent = unused(
        "torchdiffeq", "fairscale.nn.model_parallel.initialize", "fairscale.nn.model_parallel.layers"
    )
    with importable(checkout, bare=("models",), instead=absent):
        model = importlib.import_module("models.lightningdit").LightningDiT(
            **model_options(net), use_swiglu=True, use_rope=True, use_rmsnorm=True
        )
        transport = importlib.import_module("transport").create_transport(
            use_cosine_loss=True, use_lognorm=True
        )
        own = {name: m for name, m in sys.modules.items() if name.split(".")[0] == "models"}

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        terms = transport.training_losses(model, x, {"y": y})
        return terms["cos_loss"].mean() + terms["loss"].mean()

    return Script(
        model,
        loss,
        adamw(betas=(0.9, 0.95)),
        LIGHTNING_LR,
        script_function(checkout / "train.py", "update_ema"),
        _denoise_from_noise,
        is_flow=True,
        # torch.compile looks modules up by name when it compiles.
        around=partial(mock.patch.dict, sys.modules, own),
    )


def adamw(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    """The scripts' optimizer: AdamW without decay."""
    return partial(torch.optim.AdamW, weight_decay=0, **options)


def model_options(net: Net) -> dict[str, Any]:
    """Arguments of a peer's model class: all of them descend from DiT's."""
    return {
        "input_size": net.image_size,
        "patch_size": net.patch_size,
        "in_channels": net.channels,
        "hidden_size": net.width,
        "depth": net.depth,
        "num_heads": net.num_heads,
        "num_classes": net.num_classes,
    }


class Teacher:
    """The embedded ImageNet network as REPA's teacher: images (B, C, H, W) in [-1, 1] -> (B, N, D).

    Args:
        grid: cells per side of its map, one for each token; >= 2.
        device: where it runs.
    """

    def __init__(self, grid: int, device: str) -> None:
        self._network = EfficientNetLite0(device=torch.device(device))
        self._side = TEACHER_STRIDE * grid

    def __call__(self, images: Tensor) -> Tensor:
        shown = F.interpolate(images, size=(self._side, self._side), mode="bicubic")
        return feature_maps(self._network, shown).flatten(2).transpose(1, 2)


def _denoise_from_noise(model: nn.Module, x: Tensor, timestep: Tensor, labels: Any) -> Tensor:
    """For a model whose time is 0 at noise and whose velocity leads to data."""
    return -model(x, 1 - timestep / TIMESTEP_SCALE, labels)


def _mdt_model(hosts: Path, net: Net) -> nn.Module:
    return mdt_model(hosts, model_options(net))


def _train_mdt(hosts: Path, net: Net, data: ImageSet, terms: Terms) -> Training:
    torch.manual_seed(terms.seed)
    return MdtTraining(hosts, model_options(net), data, terms)


_SCRIPTS: Mapping[str, Callable[[Path, Net, str], Script]] = {
    host.name: partial(_dit_script, host) for host in IMAGE_HOSTS
}

PEERS: tuple[Peer, ...] = (
    *(_of_script(host.name, host.checkout, _SCRIPTS[host.name]) for host in IMAGE_HOSTS),
    Peer("MDT", (MDT, ADAN), _mdt_model, _train_mdt),
    _of_script("SiT", SIT, _sit_script),
    _of_script("REPA", REPA, _repa_script, "projectors."),
    _of_script("LightningDiT", LIGHTNING, _lightning_script),
)
