"""Tiny Stable Diffusion 3 and Flux pipelines in the hub's layout, random weights, and folders of images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from conformance.diffusers_stand_ins import RESOLUTION, byte_tokenizer, text_config

# Of the scheduler: a timestep is drawn in a table of shifted sigmas.
SHIFT = 3.0
# CLIP's tokens, which the scripts ask for, and the width of each CLIP encoder.
_TOKENS, _WIDTH = 77, 8
_LATENT_CHANNELS = 4


def write_sd3(folder: Path) -> None:
    """Saves a Stable Diffusion 3 pipeline."""
    import diffusers
    from transformers import CLIPTextModelWithProjection

    parts = _parts()
    text = parts.pop("text_config")
    encoders = {name: CLIPTextModelWithProjection(text).eval() for name in ("text_encoder", "text_encoder_2")}
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=RESOLUTION // 2,
        patch_size=2,
        in_channels=_LATENT_CHANNELS,
        out_channels=_LATENT_CHANNELS,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * _WIDTH,
        pooled_projection_dim=2 * _WIDTH,
        pos_embed_max_size=RESOLUTION // 4,
    )
    pipeline = diffusers.StableDiffusion3Pipeline(
        **parts,
        **encoders,
        tokenizer_2=parts["tokenizer"],
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)


def write_flux(folder: Path) -> None:
    """Saves a Flux pipeline."""
    import diffusers
    from transformers import CLIPTextModel

    parts = _parts()
    text = parts.pop("text_config")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * _LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=2 * _WIDTH,
        pooled_projection_dim=_WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = diffusers.FluxPipeline(
        **parts,
        text_encoder=CLIPTextModel(text).eval(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)


def write_images(folder: Path, number: int) -> None:
    """Saves so many random images."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    shape = (number, RESOLUTION, RESOLUTION, 3)
    for place, pixels in enumerate(generator.integers(0, 256, shape, dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{place:04}.png")


def _parts() -> dict[str, Any]:
    """What both pipelines have, and the config of their CLIP encoders. Seeds torch with 0."""
    import diffusers

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(_TOKENS)
    vae = diffusers.AutoencoderKL(
        latent_channels=_LATENT_CHANNELS,
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=RESOLUTION,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    return {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler, "text_config": text_config(tokenizer)}


def _t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=256, d_model=2 * _WIDTH, d_kv=8, d_ff=16, num_layers=1, num_heads=1)
    return T5EncoderModel(config).eval()


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    pieces = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(97, 123))]
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0)
