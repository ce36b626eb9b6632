"""REPA's train.py, through the launcher, on pictures of digits and their latents."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins import NoiseSchedule
from whole_trainings.material import write_images, write_vae
from whole_trainings.runs import Script, SmallModel
from whole_trainings.stand_ins import module_with
from whole_trainings.training import Part, Training

# The smallest that train.py takes; latents are an eighth.
SIZE = 256
SIZES = {"patch_size": 8, "depth": 2, "hidden_size": 64, "decoder_hidden_size": 64, "num_heads": 4}


class Encoder(nn.Module):
    """In place of DINOv2: a picture (B, 3, H, W) as 4 x 4 tokens, by one convolution with random weights."""

    embed_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Identity()
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, self.embed_dim))
        self.proj = nn.Conv2d(3, self.embed_dim, 1)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """The tokens (B, 16, 16)."""
        tokens = self.proj(functional.adaptive_avg_pool2d(x, 4)).flatten(2).mT
        return {"x_norm_patchtokens": tokens + self.pos_embed}


def install() -> list[str]:
    """Puts the encoder in place, which the host gets from a hub. Returns what was replaced."""
    torch.hub.load = lambda *_, **__: Encoder()
    pos_embed = module_with("timm.layers.pos_embed", resample_abs_pos_embed=lambda embedding, _: embedding)
    layers = module_with("timm.layers", pos_embed=pos_embed)
    sys.modules.update({"timm.layers": layers, "timm.layers.pos_embed": pos_embed})
    sys.modules["timm"].layers = layers
    return ["DINOv2 (one convolution with random weights; no hub here)"]


class REPA(Training):
    """A small SiT with a projector, with a random VAE and a random encoder. Its t = 0 is clean."""

    name, folder, model = "REPA", "sihyun-yu+REPA", "SiT"
    factories = (("loss", "SILoss"),)
    schedule = NoiseSchedule.rectified_flow
    options = {
        "stand_ins": "whole_trainings.hosts.repa.install",
        "small": (SmallModel("models.sit", "SiT", "SiT-small/8", SIZES, "SiT_models"),),
        "unused": ("torchvision.models", "models.mocov3_vit"),
    }
    replays = False
    # generate.py makes nothing that draws t, and the launcher refuses it; train.py samples after one step.
    samples = ("uniform", "plain")

    def prepare(self, host: Script) -> None:
        vae = AutoencoderKL.from_pretrained(write_vae(host.work / "stabilityai" / "sd-vae-ft-mse"))
        written = write_images(host.work / "images", self.steps_per_epoch * self.batch, size=SIZE)
        labels = {}
        for picture, _ in written:
            pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
            with torch.no_grad():
                moments = vae.encode(pixels).latent_dist.parameters
            # The host pairs the sorted names below both folders.
            place = picture.relative_to(host.work / "images").with_suffix(".npy")
            (host.work / "vae-sd" / place).parent.mkdir(parents=True, exist_ok=True)
            np.save(host.work / "vae-sd" / place, moments[0].numpy())
            labels[str(place)] = int(picture.parent.name)
        listed = json.dumps({"labels": list(labels.items())})
        (host.work / "vae-sd" / "dataset.json").write_text(listed, encoding="utf-8")

    def arguments(self, work: Path, part: Part) -> list[str]:
        steps = self.steps_per_epoch
        # A part that goes on does so in the folder of the first.
        arguments = ["--exp-name", part.resumed or part.name, "--output-dir", str(work / "exps")]
        arguments += ["--model", "SiT-small/8", "--encoder-depth", "1", "--data-dir", str(work)]
        arguments += ["--batch-size", str(self.batch), "--max-train-steps", str(steps * part.epochs)]
        arguments += ["--checkpointing-steps", str(steps), "--num-workers", "0", "--mixed-precision", "no"]
        arguments += ["--report-to", "tensorboard"]
        return [*arguments, "--resume-step", str(steps)] if part.resumed else arguments

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        return work / "exps" / name / "checkpoints" / f"{epochs * self.steps_per_epoch:07d}.pt"

    def index(self, t: Tensor) -> Tensor:
        return (t * 1000).long().clamp(0, 999)

    def time(self, t: Tensor) -> Tensor:
        return t


HOSTS = (REPA(),)
