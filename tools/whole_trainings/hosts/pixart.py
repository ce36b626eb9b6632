"""PixArt-alpha's train_scripts/train.py, through the launcher, on latents of digits with captions."""

import json
import sys
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoTokenizer, T5EncoderModel

from whole_trainings.colossalai_on_cpu import BlockDiagonalMask, attention
from whole_trainings.hosts import mmcv_stand_ins
from whole_trainings.material import TEXT_WIDTH, write_images, write_t5, write_vae
from whole_trainings.runs import Script, SmallModel
from whole_trainings.stand_ins import module_with
from whole_trainings.training import Part, Training

SIZE, MAX_TOKENS = 256, 120
SIZES = {"patch_size": 8, "depth": 2, "hidden_size": 64, "num_heads": 4, "caption_channels": TEXT_WIDTH}
CONFIG = """_base_ = [{base!r}]
data_root, work_dir = {data!r}, {results!r}
model = "PixArt_small"
train_batch_size, num_workers, num_epochs, save_model_steps = {batch}, 0, {epochs}, {steps}
mixed_precision = "no"
"""


def install() -> list[str]:
    """Puts mmcv and xformers in place. Returns what was replaced."""
    fmha = module_with("xformers.ops.fmha", BlockDiagonalMask=BlockDiagonalMask)
    ops = module_with("xformers.ops", fmha=fmha, memory_efficient_attention=attention)
    for module in (module_with("xformers", ops=ops), ops, fmha):
        sys.modules[module.__name__] = module
    start = Accelerator.__init__

    def without_even_batches(self: Any, even_batches: bool = True, **options: Any) -> None:
        start(self, **options)

    vars(accelerate)["Accelerator"].__init__ = without_even_batches
    names = ["xformers.ops.memory_efficient_attention (SDPA with a block mask)"]
    return [*mmcv_stand_ins.install(), *names, "accelerate's even_batches (True is the default of version 1)"]


class PixArt(Training):
    """A small PixArt by the published config, with a random VAE and T5; in float32 in place of fp16."""

    name, folder, model = "PixArt-alpha", "PixArt-alpha+PixArt-alpha", "PixArt"
    factories = (("diffusion.iddpm", "IDDPM"),)
    script, sampler = "train_scripts/train.py", "scripts/inference.py"
    options = {
        "stand_ins": "whole_trainings.hosts.pixart.install",
        "small": (
            SmallModel("diffusion.model.nets.PixArt", "PixArt", "PixArt_small", SIZES, "MODELS"),
            # inference.py has no option for the model.
            SmallModel("diffusion.model.nets", "PixArt", "PixArt_XL_2", SIZES),
        ),
    }
    says_resumed = "Resume checkpoint of epoch 1"

    def prepare(self, host: Script) -> None:
        work, self.base = host.work, host.checkout / "configs/pixart_config/PixArt_xl2_img256_internal.py"
        vae = AutoencoderKL.from_pretrained(write_vae(work / "vae"))
        # Where the host's T5Embedder looks below its folder.
        t5 = write_t5(work / "t5" / "t5-v1_1-xxl")
        tokenizer, encoder = AutoTokenizer.from_pretrained(t5), T5EncoderModel.from_pretrained(t5)
        root = work / "data" / "InternData"
        features, captions = (
            root / f"img_vae_features_{SIZE}resolution" / "noflip",
            root / "caption_feature_wmask",
        )
        for folder in (features, captions, root / "partition"):
            folder.mkdir(parents=True)
        rows = []
        for picture, caption in write_images(work / "images", self.steps_per_epoch * self.batch, size=SIZE):
            pixels = torch.from_numpy(np.array(Image.open(picture))).permute(2, 0, 1)[None] / 127.5 - 1
            tokens = tokenizer(caption, max_length=MAX_TOKENS, padding="max_length", return_tensors="pt")
            with torch.no_grad():
                moments = vae.encode(pixels).latent_dist.parameters
                text = encoder(tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
            mask = tokens["attention_mask"].numpy()
            # The host's names: the folder and the file, joined.
            name = f"digits_{picture.stem}"
            np.save(features / f"{name}.npy", moments[0].numpy())
            np.savez(captions / f"{name}.npz", caption_feature=text.numpy(), attention_mask=mask)
            rows.append({"path": f"digits/{picture.stem}.png", "ratio": 1.0, "prompt": caption})
        (root / "partition" / "data_info.json").write_text(json.dumps(rows), encoding="utf-8")
        (work / "prompts.txt").write_text(rows[0]["prompt"], encoding="utf-8")

    def arguments(self, work: Path, part: Part) -> list[str]:
        config = work / f"{part.name}_config.py"
        values = {"base": str(self.base), "data": str(work / "data"), "results": str(work / part.name)}
        values.update(batch=self.batch, epochs=part.epochs, steps=self.steps_per_epoch)
        config.write_text(CONFIG.format(**values), encoding="utf-8")
        if not part.resumed:
            return [str(config)]
        return [str(config), "--resume-from", str(self.checkpoint(work, part.resumed, 1))]

    def sampling(self, work: Path, checkpoint: Path) -> list[str]:
        paths = {"t5_path": work / "t5", "tokenizer_path": work / "vae", "txt_file": work / "prompts.txt"}
        options = [text for name, path in paths.items() for text in (f"--{name}", str(path))]
        options += ["--image_size", "512", "--sampling_algo", "iddpm", "--step", "10"]
        return [*options, "--model_path", str(checkpoint)]

    def checkpoint(self, work: Path, name: str, epochs: int) -> Path:
        return work / name / "checkpoints" / f"epoch_{epochs}_step_{epochs * self.steps_per_epoch}.pth"


HOSTS = (PixArt(),)
