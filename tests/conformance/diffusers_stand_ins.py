"""What a diffusers example needs around it: a tiny pipeline, and stand-ins for datasets and torchvision.

The stand-ins do what the text-to-image scripts need, no more.

Dims: B batch, C channels, H height, W width.
"""

import enum
import random
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

NUM_IMAGES, RESOLUTION = 128, 16
NAMES = (
    "datasets (128 random images with captions)",
    "torchvision (the transforms of the scripts, on PIL images)",
    "the pipeline (a few channels, random weights, a vocabulary of bytes)",
)
_WIDTH, _TOKENS = 8, 8
Batch = dict[str, Any]


class Examples:
    """Rows with columns, as a `datasets.Dataset` gives them to the text-to-image scripts.

    Args:
        columns: lists of one length.
        transform: applied to a batch of columns when it is read.
    """

    def __init__(self, columns: Batch, transform: Callable[[Batch], Batch] | None = None) -> None:
        self._columns = columns
        self._transform = transform

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self._read(slice(index, index + 1)).items()}

    def with_transform(
        self, transform: Callable[[Batch], Batch], output_all_columns: bool = False
    ) -> "Examples":
        """The same rows, read through another transform."""
        return Examples(self._columns, transform)

    def map(
        self, function: Callable[[Batch], Batch], *, batched: bool, batch_size: int = 1000, **_: Any
    ) -> "Examples":
        """The rows with the columns that a function returns for batches of them, in plain lists."""
        if not batched:
            raise ValueError("map needs batched=True")
        added: dict[str, list[Any]] = {}
        for start in range(0, len(self), batch_size):
            for name, values in function(self._read(slice(start, start + batch_size))).items():
                # Arrow keeps no tensors: a script gets nested lists back.
                rows = values.tolist() if isinstance(values, Tensor) else list(values)
                added.setdefault(name, []).extend(rows)
        return Examples({**self._columns, **added})

    def remove_columns(self, names: Sequence[str]) -> "Examples":
        """The rows without these columns."""
        kept = {name: values for name, values in self._columns.items() if name not in names}
        return Examples(kept, self._transform)

    def joined(self, other: "Examples") -> "Examples":
        """Rows with the columns of both."""
        return Examples({**self._columns, **other._columns})

    def _read(self, rows: slice) -> Batch:
        batch = {name: values[rows] for name, values in self._columns.items()}
        return self._transform(batch) if self._transform else batch


class Interpolation(enum.Enum):
    """torchvision's InterpolationMode, by the names that the scripts offer."""

    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Resize:
    """Scales the shorter side of an image to `size`."""

    def __init__(self, size: int, interpolation: Interpolation = Interpolation.BILINEAR) -> None:
        self._size, self._filter = size, interpolation.value

    def __call__(self, image: Image.Image) -> Image.Image:
        scale = self._size / min(image.size)
        return image.resize((round(image.width * scale), round(image.height * scale)), self._filter)


class RandomCrop:
    """Cuts a square out of an image."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return crop(image, *self.get_params(image, (self._size, self._size)))

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop in pixels."""
        top, left = random.randint(0, image.height - size[0]), random.randint(0, image.width - size[1])
        return top, left, *size


class CenterCrop(RandomCrop):
    """Cuts the middle square out of an image."""

    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of the middle in pixels."""
        return (image.height - size[0]) // 2, (image.width - size[1]) // 2, *size


class Compose:
    """Applies transforms one after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self._transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self._transforms:
            image = transform(image)
        return image


class RandomHorizontalFlip:
    """Mirrors an image with probability p."""

    def __init__(self, p: float = 0.5) -> None:
        self._p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        is_kept = random.random() >= self._p
        return image if is_kept else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """A rectangle of an image, in pixels."""
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    """An image as float32 (C, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def centred(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """(image - mean) / std, with one mean and one deviation for all channels."""
    return lambda image: (image - mean[0]) / std[0]


def stand_ins() -> dict[str, ModuleType]:
    """datasets and torchvision, for sys.modules."""
    functional = _module("torchvision.transforms.functional", crop=crop)
    transforms = _module(
        "torchvision.transforms",
        functional=functional,
        InterpolationMode=Interpolation,
        Resize=Resize,
        RandomCrop=RandomCrop,
        CenterCrop=CenterCrop,
        Compose=Compose,
        RandomHorizontalFlip=RandomHorizontalFlip,
        Lambda=lambda function: function,
        ToTensor=lambda: to_tensor,
        Normalize=centred,
    )
    torchvision = _module("torchvision", transforms=transforms)
    fingerprint = _module("datasets.fingerprint", Hasher=SimpleNamespace(hash=str))
    datasets = _module(
        "datasets",
        load_dataset=lambda *_, **__: {"train": examples()},
        concatenate_datasets=lambda parts, axis: parts[0].joined(parts[1]),
        utils=SimpleNamespace(logging=SimpleNamespace(set_verbosity_warning=bool)),
    )
    return {
        module.__name__: module for module in (functional, transforms, torchvision, fingerprint, datasets)
    }


def _module(name: str, **contents: Any) -> ModuleType:
    module = ModuleType(name)
    # Libraries look at the spec to see what is installed.
    vars(module).update(contents, __spec__=ModuleSpec(name, None), __path__=[])
    return module


def examples() -> Examples:
    """Random images in landscape format, with captions."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (NUM_IMAGES, RESOLUTION, 2 * RESOLUTION, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    return Examples({"image": images, "text": [f"no {number}" for number in range(NUM_IMAGES)]})


def write_pipeline(folder: Path, *, is_xl: bool) -> None:
    """Saves a Stable Diffusion or SDXL pipeline in the hub's layout, with random weights from seed 0."""
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(_TOKENS)
    text = text_config(tokenizer)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=2,
        sample_size=RESOLUTION,
    )
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    parts = {"vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "scheduler": scheduler}
    if is_xl:
        # The UNet gets the tokens of both encoders, and six time ids beside the pooled text.
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": _WIDTH}
        unet = _unet(2 * _WIDTH, projection_class_embeddings_input_dim=7 * _WIDTH, **added)
        second = {"text_encoder_2": CLIPTextModelWithProjection(text), "tokenizer_2": tokenizer}
        pipeline: Any = diffusers.StableDiffusionXLPipeline(**parts, **second, unet=unet)
    else:
        unchecked = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**parts, **unchecked, unet=_unet(_WIDTH))
    pipeline.save_pretrained(folder)


def byte_tokenizer(num_tokens: int) -> Any:
    """A CLIP tokenizer whose words are bytes, for texts of so many tokens at most."""
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=num_tokens)


def text_config(tokenizer: Any) -> Any:
    """The config of a tiny text encoder of CLIP, for this tokenizer."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=_WIDTH,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _unet(cross_attention_dim: int, **added: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=RESOLUTION // 2,
        block_out_channels=(_WIDTH, _WIDTH),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=1,
        cross_attention_dim=cross_attention_dim,
        **added,
    )
