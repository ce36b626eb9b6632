"""For trainers of images: images with captions, small text encoders, and tokenizers in the hub's layout."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from speedit_plugins.trainer.data.videos.moving_digits import MovingDigits
from whole_trainings.material import pixels

TEXT_WIDTH = 32
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def write_images(folder: Path, count: int, *, size: int) -> list[Path]:
    """Writes handwritten digits as 0000.png, ... in colour, and the caption of each as 0000.txt.

    Args:
        folder: is made.
        count: of images.
        size: height and width: 16, 32 or 64.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digits, generator = MovingDigits(image_size=size, num_frames=3), torch.Generator().manual_seed(0)
    paths = [folder / f"{index:04d}.png" for index in range(count)]
    for index, path in enumerate(paths):
        sample = digits.load(index, generator)
        # The digit is whole in the middle frame.
        frame = pixels(sample["video"])[1, :, :, 0].numpy()
        Image.fromarray(frame).convert("RGB").save(path)
        path.with_suffix(".txt").write_text(sample["caption"], encoding="utf-8")
    return paths


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with letters as its words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    end = "<|endoftext|>"
    special = {"bos_token": "<|startoftext|>", "eos_token": end, "unk_token": end, "pad_token": end}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_t5_tokenizer(folder: Path) -> None:
    """T5's tokenizer with letters as its words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    words = ["<pad>", "</s>", "<unk>", "\u2581", *_LETTERS]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0).save_pretrained(folder)


def clip_text_model() -> Any:
    """A CLIP text encoder with one layer and random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    number = 2 * len(_LETTERS)
    sizes = {"hidden_size": TEXT_WIDTH, "intermediate_size": TEXT_WIDTH, "projection_dim": TEXT_WIDTH}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": number, "eos_token_id": number + 1, "pad_token_id": number + 1}
    return CLIPTextModel(CLIPTextConfig(vocab_size=number + 2, **sizes, **layers, **special))


def t5_encoder() -> Any:
    """A T5 encoder with one layer and random weights."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    sizes = {"d_model": TEXT_WIDTH, "d_kv": 16, "d_ff": TEXT_WIDTH, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=64, feed_forward_proj="gated-gelu", pad_token_id=0, **sizes))
