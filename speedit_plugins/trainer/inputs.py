"""From a batch of the loader to what the model is given: latents, noise, condition.

Dims: B samples, C channels, F frames (absent for images), H x W pixels, h x w latent cells, L caption tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.data.latents.cache import TEXT, sample_latents
from speedit_plugins.trainer.models.text import CaptionSource, dropped

Generators = Sequence[torch.Generator]

# Frames that an encoder has at once: of 256 x 256 pixels the largest tensors of Stable Diffusion's, 256
# channels in float32, are 64 MiB a frame, and several live at a time.
FRAMES_AT_ONCE = 16


class Encoder(Protocol):
    """Between images (B, C, H, W) in [-1, 1] and what the model is trained on."""

    channels: int
    image_channels: int
    downsample: int

    def encode(self, images: Tensor, generators: list[torch.Generator]) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def fingerprint(self) -> str: ...


class MaskSource(Protocol):
    """Draws holes: a mask (H, W), 1 in the hole."""

    def draw(self, height: int, width: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class ModelInputs:
    """Latents and noise (B, C, [F,] h, w), and the condition of each sample."""

    latents: Tensor
    noise: Tensor
    condition: Condition


class BatchEncoder:
    """Encodes batches; every random choice of a sample comes from its own generator.

    Args:
        encoder: of images, or of the frames of a video one by one.
        device: where everything is wanted.
        is_labelled: whether the batch's "label" is a condition.
        captions: gives the features of the batch's "caption", where the batch does not bring them.
        null_text: features of the empty caption (1, L, ...), which take the place of dropped ones.
        caption_dropout_prob: how often a caption is dropped, in [0, 1).
        masks: draws a hole in each image, and makes the model fill it.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        *,
        is_labelled: bool,
        captions: CaptionSource | None = None,
        null_text: Mapping[str, Tensor] | None = None,
        caption_dropout_prob: float = 0.0,
        masks: MaskSource | None = None,
    ) -> None:
        self.encoder, self.device, self.captions = encoder, device, captions
        self._is_labelled, self._null_text, self._dropout = is_labelled, null_text, caption_dropout_prob
        self._masks = masks

    @property
    def num_cut_captions(self) -> int | None:
        """Captions cut so far on this rank; None without captions to encode."""
        return None if self.captions is None else self.captions.num_cut

    def encode(self, batch: Mapping[str, Any], generators: Generators) -> ModelInputs:
        """The inputs of a batch of the loader.

        Args:
            batch: "image" (B, C, H, W) or "video" (B, C, F, H, W) in [-1, 1], or their cached latents;
                "label" (B,) int64, "caption" or its cached features where the model wants them.
            generators: one per sample, on the device.
        """
        on_device = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        # Before the encoder draws: so these are the same for cached latents, whatever made them.
        noise = _noise(self._latent_shape(on_device), generators, self.device)
        condition = self._condition(on_device, generators)
        latents = self._latents(on_device, generators)
        if self._masks is not None:
            condition = with_extra(condition, self._hole(on_device, generators, self._masks))
        return ModelInputs(latents, noise, condition)

    def _hole(self, batch: Mapping[str, Any], generators: Generators, masks: "MaskSource") -> Tensor:
        if "image" not in batch:
            raise ValueError(f"inpainting needs images, got batches of {', '.join(sorted(batch))}")
        height, width = batch["image"].shape[2:]
        drawn = [masks.draw(height, width, generator) for generator in generators]
        mask = torch.stack(drawn).unsqueeze(1).to(self.device)  # (B, 1, H, W)
        return masked_latents(self.encoder, batch["image"], mask, generators)

    def _latent_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        if "latent_mean" in batch:
            return tuple(batch["latent_mean"].shape)
        pixels = batch["image"] if "image" in batch else batch["video"]
        height, width = (side // self.encoder.downsample for side in pixels.shape[-2:])
        return (len(pixels), self.encoder.channels, *pixels.shape[2:-2], height, width)

    def _latents(self, batch: Mapping[str, Any], generators: Generators) -> Tensor:
        if "latent_mean" in batch:
            return sample_latents(batch["latent_mean"], batch["latent_std"], generators)
        with torch.no_grad():
            if "image" in batch:
                return self.encoder.encode(batch["image"], list(generators))
            return encode_video(self.encoder, batch["video"], generators)

    def _condition(self, batch: Mapping[str, Any], generators: Generators) -> Condition:
        if self._is_labelled:
            label: Tensor = batch["label"]
            return label
        if self._null_text is None:
            return None
        if TEXT[0] in batch:
            features = dict(zip(("tokens", "mask"), (batch[name] for name in TEXT), strict=True))
        elif self.captions is None or "caption" not in batch:
            raise ValueError(
                f"text_encoder needs data with captions, got batches of {', '.join(sorted(batch))}"
            )
        else:
            encoded = self.captions.encode(batch["caption"])
            features = {name: value.to(self.device) for name, value in encoded.items()}
        if not self._dropout:
            return features
        coins = [torch.rand(1, generator=generator, device=generator.device) for generator in generators]
        return dropped(features, self._null_text, torch.cat(coins).to(self.device) < self._dropout)


def masked_latents(encoder: Encoder, images: Tensor, mask: Tensor, generators: Generators) -> Tensor:
    """What an inpainting model sees beside x: the mask and the latents of the rest, (B, 1 + C, h, w).

    Source: the order and meaning of Stable Diffusion's inpainting model.

    Args:
        images: (B, channels, H, W) in [-1, 1].
        mask: (B, 1, H, W), 1 in the hole, which becomes 0, mid-grey.
        generators: one per image.
    """
    with torch.no_grad():
        rest = encoder.encode(images * (1 - mask), list(generators))
    return torch.cat([functional.interpolate(mask, rest.shape[2:], mode="nearest"), rest], dim=1)


def with_extra(condition: Condition, extra: Tensor) -> Condition:
    """The condition with "extra" beside it; labels become "label"."""
    if isinstance(condition, Tensor):
        return {"label": condition, "extra": extra}
    return {**(condition or {}), "extra": extra}


def encode_video(encoder: Encoder, videos: Tensor, generators: Generators) -> Tensor:
    """Videos (B, C, F, H, W) in [-1, 1] -> latents (B, c, F, h, w), `FRAMES_AT_ONCE`.

    Args:
        generators: one per video; its frames draw one after the other.
    """
    B, _, F, _, _ = videos.shape
    frames = videos.transpose(1, 2).flatten(0, 1)  # (B F, C, H, W)
    each = [generator for generator in generators for _ in range(F)]
    parts = [slice(first, first + FRAMES_AT_ONCE) for first in range(0, B * F, FRAMES_AT_ONCE)]
    latents = [encoder.encode(frames[part], each[part]) for part in parts]
    return torch.cat(latents).unflatten(0, (B, F)).transpose(1, 2)


def decode_video(encoder: Encoder, latents: Tensor) -> Tensor:
    """Latents (B, c, F, h, w) -> videos (B, C, F, H, W), about [-1, 1], `FRAMES_AT_ONCE`."""
    B, _, F, _, _ = latents.shape
    parts = latents.transpose(1, 2).flatten(0, 1).split(FRAMES_AT_ONCE)
    frames = torch.cat([encoder.decode(part) for part in parts])  # (B F, C, H, W)
    return frames.unflatten(0, (B, F)).transpose(1, 2)


def _noise(shape: Sequence[int], generators: Generators, device: torch.device) -> Tensor:
    """Standard normal, each sample's from its own generator."""
    noise = torch.empty(tuple(shape), device=device)
    for row, generator in zip(noise, generators, strict=True):
        torch.randn(row.shape, generator=generator, out=row)
    return noise
