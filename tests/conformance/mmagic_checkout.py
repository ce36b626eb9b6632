"""A checkout of mmagic on the CPU: its import, with stand-ins for what is missing, and its training step."""

import copy
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from conformance.mmagic import PLUGIN
from conformance.seam import seeded
from conformance.stand_ins import StandIns
from speedit_plugins.hosts.attachment import attachment_of
from speedit_plugins.hosts.draws.draw_stream import DrawStream

# Packages that the checkout imports, and its scheduler, unet and ADM do not use.
STAND_INS = (
    *("mmcv", "torchvision", "imageio", "lpips", "clip", "open_clip", "albumentations", "face_alignment"),
    *("controlnet_aux", "resize_right", "wandb", "requests", "pandas", "apex", "xformers"),
)
# The host registers every model of diffusers as of 2023, and fails with those of today.
REPLACED = ("diffusers", "transformers")


def check_train_step() -> None:
    """Runs ADM.train_step with the host's DenoisingUnet. Names that it reads and nobody defines are defined.

    Raises:
        AssertionError: the step trains with another loss than the policy's, or changes no weight; or the host
            lacks other names than integrations/mmagic/speed_adm.py defines.
    """
    import_module(PLUGIN)
    registry, engine = import_module("mmagic.registry"), import_module("mmagic.engine")
    hub = import_module("mmengine").MessageHub.get_current_instance()
    hub.update_info("iter", 0)
    import_module("mmagic.models")
    # Runner does this for the host's configs, by their default_scope.
    import_module("mmengine.registry").init_default_scope("mmagic")
    torch.manual_seed(0)
    model = registry.MODELS.build(ADM)
    optim = {"denoising": {"optimizer": {"type": "SGD", "lr": 0.1}, "modules": "unet"}}
    wrapper = engine.optimizers.MultiOptimWrapperConstructor(optim)(model)
    data = {"inputs": [torch.randint(0, 256, (3, 32, 32)).float() for _ in range(4)], "data_samples": None}
    faults = _mended(model, lambda: model.train_step(copy.deepcopy(data), wrapper))
    losses = []
    for _ in range(3):
        images = model.data_preprocessor(copy.deepcopy(data), True)["inputs"]
        _seed(model)
        expected = model.diffusion_scheduler.training_loss(model.unet, images, None)["loss"]
        before = [value.clone() for value in model.unet.parameters()]
        _seed(model)
        logged = model.train_step(copy.deepcopy(data), wrapper)["loss"]
        assert torch.equal(logged, expected), f"train_step logs {logged}, the policy's loss is {expected}"
        moved = [not torch.equal(*pair) for pair in zip(before, model.unet.parameters(), strict=True)]
        assert any(moved), "train_step left the weights"
        losses.append(logged.item())
    # Three steps of descent with the same batch, t and noise.
    assert losses == sorted(losses, reverse=True), f"the loss does not fall: {losses}"
    assert faults == ["_parse_losses", "with_ema_denoising"], f"train_step lacks {faults}"


def _seed(model: Any) -> None:
    """The same t and noise in the next step as in the last."""
    torch.manual_seed(1)
    attachment_of(model.diffusion_scheduler).stream = DrawStream(seeded())


def _mended(model: Any, step: Callable[[], object]) -> list[str]:
    """Defines, one by one, the names that the step reads and nobody defines. Returns them."""
    missing = {"_parse_losses": model.parse_losses, "with_ema_denoising": False}
    faults: list[str] = []
    while True:
        try:
            step()
        except AttributeError as error:
            found = [name for name in missing if f"no attribute '{name}'" in str(error)]
            if not found or found[0] in faults:
                raise
            faults += found
            setattr(model, found[0], missing[found[0]])
        else:
            return faults


ADM = {
    "type": "AblatedDiffusionModel",
    "data_preprocessor": {"type": "DataPreprocessor"},
    "unet": {
        "type": "DenoisingUnet",
        "image_size": 32,
        "base_channels": 32,
        "resblocks_per_downsample": 1,
        "channels_cfg": [1, 2],
        "attention_res": [16],
        "output_cfg": {"mean": "eps", "var": "fixed"},
    },
    "diffusion_scheduler": {"type": "SpeeDiffusion", "policy": "speedit"},
}


def import_checkout(checkout: Path) -> Callable[[], list[str]]:
    """Makes `mmagic` of a checkout importable. Returns a function: which packages stand-ins replaced."""
    sys.path.insert(0, str(checkout))
    last, first = StandIns(STAND_INS), StandIns(REPLACED)
    sys.meta_path.append(last)
    sys.meta_path.insert(0, first)
    if not hasattr(np, "bool8"):
        # numpy 2 has it no more, and the host's import reads it.
        np.bool8 = np.bool_  # type: ignore[attr-defined]  # it is missing
    mmcv = import_module("mmcv")
    if "mmcv" in last.used:
        _fill_in_mmcv(mmcv)
    return lambda: sorted({*last.used, *first.used})


def _fill_in_mmcv(mmcv: ModuleType) -> None:
    """Adds what a unet of the host needs of mmcv: version check, normalisation layers, last layer."""
    utils, bricks = import_module("mmcv.utils"), import_module("mmcv.cnn.bricks")
    vars(mmcv).update(__version__="2.1.0")
    vars(utils).update(digit_version=import_module("mmengine.utils").digit_version)
    vars(bricks).update(build_norm_layer=_norm_layer)
    vars(import_module("mmcv.cnn.bricks.conv_module")).update(ConvModule=_ConvModule)


def _norm_layer(cfg: dict[str, Any], num_features: int) -> tuple[str, nn.Module]:
    if cfg["type"] != "GN":
        raise ValueError(f"the stand-in for mmcv has norm layer GN, got {cfg['type']}")
    return "gn", nn.GroupNorm(cfg["num_groups"], num_features)


class _ConvModule(nn.Module):
    """The unet's last layer: normalisation, SiLU and convolution."""

    def __init__(self, in_channels: int, out_channels: int, norm_cfg: dict[str, Any], **options: Any) -> None:
        super().__init__()
        assert options.pop("order") == ("norm", "act", "conv")
        assert options.pop("act_cfg")["type"] == "SiLU"
        self.norm = _norm_layer(norm_cfg, in_channels)[1]
        self.conv = nn.Conv2d(in_channels, out_channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(nn.functional.silu(self.norm(x)))
        return answer
