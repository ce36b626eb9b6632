"""Tiny models of the kinds on the hub, saved in the layout of the hub."""

from pathlib import Path
from typing import Any

import torch

WORDS = ("a", "red", "green", "heart", "apple", "handwritten", "moving", "left", "right", "3", "7")
TEXT_WIDTH = 16


def save_tokenizer(folder: Path, *, words: tuple[str, ...] = WORDS) -> None:
    """Saves a tokenizer that splits at spaces and ends each caption with </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - no password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def save_text_encoder(folder: Path, kind: str) -> None:
    """Saves a text encoder of transformers, `TEXT_WIDTH` wide: "t5", "clip", "bert" or "whole clip"."""
    import transformers as t

    torch.manual_seed(0)
    size = {"vocab_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    models: dict[str, Any] = {
        "t5": lambda: t.T5EncoderModel(
            t.T5Config(vocab_size=16, d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "clip": lambda: t.CLIPTextModel(
            t.CLIPTextConfig(**size, hidden_size=TEXT_WIDTH, eos_token_id=1, pad_token_id=0)
        ),
        # With the image tower, as CLIP is saved on the hub.
        "whole clip": lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**size, "hidden_size": TEXT_WIDTH, "eos_token_id": 1, "pad_token_id": 0},
                vision_config={"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
                | {"num_attention_heads": 2, "image_size": 8, "patch_size": 4},
                projection_dim=4,
            )
        ),
        "bert": lambda: t.BertModel(t.BertConfig(**size, hidden_size=TEXT_WIDTH)),
    }
    models[kind]().save_pretrained(folder)


def save_autoencoder(folder: Path, **options: Any) -> None:
    """Saves an `AutoencoderKL` that halves the side lengths once."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    size: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 0.3,
        **options,
    }
    AutoencoderKL(**size).save_pretrained(folder)


def save_pipeline(folder: Path, kind: str) -> Path:
    """Saves the parts of a pipeline with the model "PixArt", "UNet" or "LatteT2V". Returns the folder."""
    from speedit_plugins.trainer.models.text_conditioned.latte_t2v import LatteT2V
    from speedit_plugins.trainer.models.text_conditioned.pixart import PixArt
    from speedit_plugins.trainer.models.text_conditioned.unet import UNet

    save_tokenizer(folder / "tokenizer")
    save_text_encoder(folder / "text_encoder", "clip" if kind == "UNet" else "t5")
    save_autoencoder(folder / "vae")
    torch.manual_seed(0)
    text = {"text_width": TEXT_WIDTH, "text_length": 8}
    size = {"num_layers": 1, "num_heads": 2, "head_dim": 16}
    models: dict[str, Any] = {
        "PixArt": lambda: PixArt(input_size=4, **size, **text),
        "LatteT2V": lambda: LatteT2V(input_size=8, num_frames=3, **size, **text),
        "UNet": lambda: UNet(input_size=4, block_out_channels=(32, 32), layers_per_block=1, **text),
    }
    models[kind]().net.save_pretrained(folder / ("unet" if kind == "UNet" else "transformer"))
    return folder
