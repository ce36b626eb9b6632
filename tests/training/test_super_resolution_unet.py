"""diffusers' UNet as a super-resolution model: its training step, what learns, and resuming."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from runs import generators, stepped, weights
from torch.testing import assert_close
from torch.utils.data import default_collate

from speedit_plugins.trainer.config.loading import load_config
from speedit_plugins.trainer.training.assembly import build_trainer
from speedit_plugins.trainer.training.trainer import Trainer

EMOJI = "configs/text_to_image/emoji_pixart.yaml"
NEW = "net.class_embedding."


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Captions of 16 images of coarse blocks, which their low resolution determines."""
    draws = np.random.default_rng(0)
    for number in range(16):
        blocks = draws.integers(0, 256, (4, 4, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
        Image.fromarray(blocks).save(tmp_path / f"{number}.png")
    lines = ["path,text", *(f"{tmp_path}/{number}.png,blocks {number}" for number in range(16))]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    return tmp_path / "captions.csv"


def unet_trainer(folder: Path, table: Path) -> Trainer:
    sizes = "block_out_channels: [32, 32], layers_per_block: 1, attention_head_dim: 2, text_width: 384"
    options = [
        f"experiment_dir={folder}",
        f"model={{type: UNet, {sizes}, text_length: 16}}",
        "image_size=16",
        f"data.dataset={{type: ImageCaptions, captions_file: {table}}}",
        "super_resolution.factor=2",
        "diffusion={type: SpeeDiffusion, prediction_type: x0, learn_sigma: false, policy: uniform}",
        *("data.batch_size=4", "data.num_workers=0", "max_training_steps=100", "precision=fp32"),
        *("optimizer={lr: 2e-3, warmup_steps: 0}", "caption_dropout_prob=0.1", "guidance_scale=1"),
    ]
    return build_trainer(load_config(EMOJI, "train", options))


def mean_error(trainer: Trainer) -> float:
    """Mean square error of x_0 for fixed samples and noise, far from clean."""
    draws = generators(4)
    batch = default_collate([trainer.loader.dataset.load(item, draws[item]) for item in range(4)])
    given = trainer.inputs.encode(batch, draws)
    index = torch.tensor([600, 700, 800, 900])
    kept = trainer.objective.process.schedule.alphas_cumprod[index].float().view(-1, 1, 1, 1)
    x_t = kept.sqrt() * given.latents + (1 - kept).sqrt() * given.noise
    with torch.no_grad():
        found = trainer.model(x_t, index, given.condition)
    return float((found - given.latents).square().mean())


def test_a_unet_learns_from_its_low_resolution_input_and_resumes_bit_for_bit(
    tmp_path: Path, table: Path
) -> None:
    whole = unet_trainer(tmp_path / "whole", table)
    before, error = weights(whole), mean_error(whole)
    stepped(whole, 30)
    after = weights(whole)
    # All of the level's embedding: its last layer, which starts at 0, and through it the first.
    level = [name for name in after if name.startswith(NEW)]
    assert len(level) == 4
    assert not any(torch.equal(before[name], after[name]) for name in level)
    # The channels of the low-resolution input, beside those of x.
    first = "net.conv_in.weight"
    assert before[first].shape[1] == 6
    assert not torch.isclose(before[first][:, 3:], after[first][:, 3:], rtol=0, atol=1e-6).all()
    # At these timesteps x is mostly noise, and the input determines the sample. With noise in place of the
    # input more than two thirds of the error stay.
    assert mean_error(whole) < 0.5 * error
    parts = stepped(unet_trainer(tmp_path / "parts", table), 15)
    path = parts.save()
    resumed = unet_trainer(tmp_path / "parts", table)
    resumed.restore(path)
    assert_close(weights(stepped(resumed, 15)), after, rtol=0, atol=0)
    assert_close(resumed.averaged_weights(), whole.averaged_weights(), rtol=0, atol=0)
