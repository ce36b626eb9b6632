"""Trains a small autoencoder whose latents are a data set of benchmarks/flow.

    python -m benchmarks.flow.small_autoencoder --data-dir DIR [--steps 1500] [--kl 1e-6]

It is an `AutoencoderKL` of diffusers for images of 32 x 32 pixels, with latents 4 x 8 x 8, trained on the
emoji of two vendors and on Fashion-MNIST. Writes DIR/autoencoder.

Dims: N images, C latent channels, h x w cells of a latent.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SIDE = 32
CHANNELS = 4
NUM_GREY = 4000


class SmallAutoencoder:
    """Encodes to latents whose channels have mean 0 and variance 1 on the data, and decodes them.

    Args:
        model: an `AutoencoderKL`.
        mean, std: of each channel of its latents, (1, C, 1, 1).
    """

    def __init__(self, model: Any, mean: Tensor, std: Tensor) -> None:
        self._model, self._mean, self._std = model.eval().requires_grad_(False), mean, std

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) in [-1, 1] -> the means of their latents, (N, 4, 8, 8)."""
        parts = [self._model.encode(part).latent_dist.mean for part in images.split(250)]
        return (torch.cat(parts) - self._mean) / self._std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (N, 4, 8, 8) -> images (N, 3, 32, 32), about in [-1, 1]."""
        parts = [self._model.decode(part * self._std + self._mean).sample for part in latents.split(250)]
        return torch.cat(parts)


def load_autoencoder(folder: Path) -> SmallAutoencoder:
    """What this script wrote."""
    from diffusers import AutoencoderKL

    found = json.loads((folder / "latents.json").read_text(encoding="utf-8"))
    model = AutoencoderKL.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    return SmallAutoencoder(model, *(torch.tensor(found[key]).view(1, -1, 1, 1) for key in ("mean", "std")))


def main() -> None:
    """Prints the error of reconstruction as it falls."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.flow.small_autoencoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--steps", type=int, default=1500, help="of training, 32 images each")
    parser.add_argument("--kl", type=float, default=1e-6, help="weight of the divergence from N(0, 1)")
    parser.add_argument(
        "--name", default="autoencoder", help="folder to write, inside the folder of the data"
    )
    arguments = parser.parse_args()
    train(_images(arguments.data_dir), arguments.data_dir / arguments.name, arguments.steps, arguments.kl)


def train(images: Tensor, folder: Path, steps: int, kl: float, *, batch_size: int = 32) -> None:
    """Trains on images (N, 3, 32, 32) in [-1, 1] and writes the model and its latents' scale to `folder`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        batch = images[torch.randint(len(images), (batch_size,))]
        posterior = model.encode(batch).latent_dist
        error = (model.decode(posterior.sample()).sample - batch).abs().mean()
        (error + kl * posterior.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0 or step == 20:
            print(f"{time.perf_counter() - start:6.0f} s  step {step}: error {error:.4f}", flush=True)
    model.eval()
    with torch.no_grad():
        latents = torch.cat([model.encode(part).latent_dist.mean for part in images.split(250)])
    model.save_pretrained(folder)
    scale = {"mean": latents.mean(dim=(0, 2, 3)).tolist(), "std": latents.std(dim=(0, 2, 3)).tolist()}
    (folder / "latents.json").write_text(json.dumps(scale) + "\n", encoding="utf-8")


def _images(folder: Path) -> Tensor:
    from benchmarks.flow.sets import VENDORS, emoji, fashion

    grey = fashion(folder, SIDE).images[:NUM_GREY].expand(-1, 3, -1, -1)
    return torch.cat([grey, *(emoji(folder, vendor, SIDE) for vendor in VENDORS)])


if __name__ == "__main__":
    main()
