"""musubi-tuner's Z-Image in small, in the process of a run: its own class and loader, with other sizes."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from whole_trainings.recording import Record
from whole_trainings.script_steps import Steps

SIZES = {
    "DEFAULT_TRANSFORMER_DIM": 64,
    "DEFAULT_TRANSFORMER_N_LAYERS": 1,
    "DEFAULT_TRANSFORMER_N_REFINER_LAYERS": 1,
    "DEFAULT_TRANSFORMER_N_HEADS": 2,
    "DEFAULT_TRANSFORMER_N_KV_HEADS": 2,
    "DEFAULT_TRANSFORMER_CAP_FEAT_DIM": 32,
    "ROPE_AXES_DIMS": [8, 12, 12],
}
CHANNELS, PATCH = 16, 8


def prepare(record: Record, work: Path, replayed: Sequence[Tensor] | None) -> list[str]:
    """Makes the host small, writes weights and caches at the first run, and records the steps.

    With `uniform` a flow draws as the host does, so no t are replayed.
    """
    # The script's folder is the package itself.
    sys.path.insert(1, str(Path(sys.path[0]).parent))
    vars(import_module("musubi_tuner.zimage.zimage_config")).update(SIZES)
    model = import_module("musubi_tuner.zimage.zimage_model")
    if not (work / "cache").is_dir():
        _write_weights(model, work / "zimage.safetensors")
        _write_caches(work / "images", work / "cache")
    steps = Steps(record)
    steps.watch_model(model.ZImageTransformer2DModel, "t")
    steps.watch_error(torch.nn.functional, "mse_loss")
    recorder = import_module("musubi_tuner.utils.train_utils").LossRecorder
    own: Callable[..., None] = recorder.add

    def add(self: Any, *, epoch: int, step: int, loss: float) -> None:
        steps.reported(loss)
        own(self, epoch=epoch, step=step, loss=loss)

    recorder.add = add
    return [
        "Z-Image (the host's class, of a few channels, random weights)",
        "its VAE (a random projection of 8 x 8 pixels) and Qwen3 (a random vector for each letter)",
    ]


def _write_weights(model: Any, path: Path) -> None:
    torch.manual_seed(0)
    # The host's loader makes it empty, on the meta device.
    empty = model.create_model("torch", False, torch.float32)
    weights = {name: torch.randn(each.shape) * 0.05 for name, each in empty.state_dict().items()}
    save_file(weights, path)


def _write_caches(images: Path, folder: Path) -> None:
    """The caches that the host's scripts write before a training, by its own functions."""
    folder.mkdir()
    data = import_module("musubi_tuner.dataset.image_video_dataset")
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(3 * PATCH**2, CHANNELS, generator=generator) / PATCH
    letters = torch.randn(128, SIZES["DEFAULT_TRANSFORMER_CAP_FEAT_DIM"], generator=generator)
    for path in sorted(images.glob("*.png")):
        pixels = torch.from_numpy(np.array(Image.open(path))).float() / 127.5 - 1  # (H, W, 3)
        patches = pixels.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2)
        latent = (patches @ projection).permute(2, 0, 1)
        caption = path.with_suffix(".txt").read_text(encoding="utf-8")
        height, width = pixels.shape[:2]
        item = data.ItemInfo(path.stem, caption, (width, height), (width, height))
        item.latent_cache_path = str(folder / f"{path.stem}_{width:04d}x{height:04d}_zi.safetensors")
        item.text_encoder_output_cache_path = str(folder / f"{path.stem}_zi_te.safetensors")
        data.save_latent_cache_z_image(item, latent.contiguous())
        embedding = letters[torch.tensor([ord(letter) for letter in caption])]
        data.save_text_encoder_output_cache_z_image(item, embedding)
