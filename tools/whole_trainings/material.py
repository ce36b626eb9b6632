"""Data and small networks for the hosts: moving digits as MP4, and a VAE and a T5 in the hub's layout.

Dims: F frames, H height, W width.
"""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.data.videos.files import write_mp4
from speedit_plugins.trainer.data.videos.moving_digits import MovingDigits

TEXT_WIDTH = 16


def write_videos(folder: Path, count: int, *, size: int, num_frames: int) -> list[tuple[Path, str]]:
    """Writes the first `count` moving digits as 0000.mp4, ...

    Args:
        folder: is made.
        count: of videos.
        size: H and W: 16, 32 or 64.
        num_frames: F.

    Returns:
        Path and caption of each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits, generator = MovingDigits(image_size=size, num_frames=num_frames), torch.Generator().manual_seed(0)
    written = []
    for index in range(count):
        sample = digits.load(index, generator)
        path = folder / f"{index:04d}.mp4"
        write_mp4(path, pixels(sample["video"]), fps=8)
        written.append((path, sample["caption"]))
    return written


def write_images(folder: Path, count: int, *, size: int) -> list[tuple[Path, str]]:
    """Writes `count` pictures of digits as DIGIT/DIGIT_0000.png, ...

    Args:
        folder: is made.
        count: of pictures.
        size: H and W; the digits are drawn at 64 pixels at most, and enlarged.

    Returns:
        Path and caption of each.
    """
    from PIL import Image

    digits, generator = (
        MovingDigits(image_size=min(size, 64), class_cond=True),
        torch.Generator().manual_seed(0),
    )
    written = []
    for index in range(count):
        sample = digits.load(index, generator)
        path = folder / str(sample["label"]) / f"{sample['label']}_{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels(sample["video"])[0, :, :, 0].numpy()).convert("RGB")
        image.resize((size, size)).save(path)
        written.append((path, sample["caption"]))
    return written


def pixels(video: Tensor) -> Tensor:
    """A grey video (1, F, H, W) in [-1, 1] as uint8 (F, H, W, 1)."""
    return ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0)


def write_table(path: Path, rows: list[list[Any]]) -> Path:
    """Writes a CSV file. Returns its path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_vae(folder: Path, channels: tuple[int, ...] = (4, 4, 4, 4)) -> Path:
    """An AutoencoderKL with few channels, 8 times smaller latents and random weights. Returns its folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=4,
    )
    vae.save_pretrained(folder)
    return folder


def caption_words() -> list[str]:
    """The words of the captions."""
    return sorted({word for text in MovingDigits.captions for word in text.split()})


def write_t5(folder: Path, *, unigram: bool = False) -> Path:
    """A T5 encoder with one layer, random weights, and a tokenizer with the words of the captions.

    Args:
        folder: is made.
        unigram: whether the tokenizer is for the class T5Tokenizer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5Tokenizer

    torch.manual_seed(0)
    words = ["<pad>", "</s>", "<unk>", *caption_words()]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 - not a password
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if unigram:
        scores = [(f"\u2581{word}", -1.0) for word in words[3:]]
        T5Tokenizer(vocab=[*((word, 0.0) for word in words[:3]), *scores]).save_pretrained(folder)
    else:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = T5Config(
        vocab_size=len(words), d_model=TEXT_WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path) -> Path:
    """A CLIP text model with one layer, random weights, and a tokenizer with the letters of the captions."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = sorted({letter for word in caption_words() for letter in word})
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    CLIPTokenizer(vocab={piece: row for row, piece in enumerate(pieces)}, merges=[]).save_pretrained(folder)
    size = {"hidden_size": TEXT_WIDTH, "intermediate_size": 32, "projection_dim": TEXT_WIDTH}
    size |= {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(pieces)}
    CLIPTextModel(CLIPTextConfig(**size, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    return folder
