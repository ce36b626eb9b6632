"""Turns a batch of the loader into the inputs of the model: latents, noise and condition.

Dims: `B` samples, `C` channels, `F` frames (absent for images), `H`, `W` sides in pixels, `h`, `w` sides of
the latent, `L` caption tokens. A shape has other axes after its channels: `N` points, or three sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.data.holes import draw_hole, hole_key
from speedit_plugins.trainer.data.latents.cache import FEATURES, TEXT, sample_latents
from speedit_plugins.trainer.layouts import IMAGES, SHAPES
from speedit_plugins.trainer.models.pretrained.text import CaptionSource, dropped

Generators = Sequence[torch.Generator]

# Frames that an encoder gets per call. At 256 x 256 pixels, the largest tensors of Stable Diffusion's encoder
# (256 channels, float32) take 64 MiB per frame, and several of them exist at a time.
FRAMES_AT_ONCE = 16


class Encoder(Protocol):
    """Maps images (B, C, H, W) in [-1, 1] to the latents that the model is trained on, and back."""

    channels: int
    image_channels: int
    downsample: int

    def encode(self, images: Tensor, generators: list[torch.Generator]) -> Tensor: ...
    def decode(self, latents: Tensor) -> Tensor: ...
    def fingerprint(self) -> str: ...


class FeatureSource(Protocol):
    """Maps images (B, C, H, W) in [-1, 1] to a map of features (B, D, h', w'), while `is_wanted`."""

    is_wanted: bool

    def encode(self, images: Tensor) -> Tensor: ...


class LowResolutionSource(Protocol):
    """Makes the low-resolution input of a super-resolution model, and what it is told about it."""

    def of_batch(self, batch: Mapping[str, Any], generators: Generators) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class ModelInputs:
    """Latents and noise (B, C, [F,] h, w), and the condition of the samples.

    `features` are a teacher's of the clean samples, (B, [F,] D, h', w'), if a training wants them.
    """

    latents: Tensor
    noise: Tensor
    condition: Condition
    features: Tensor | None = None


class BatchEncoder:
    """Encodes batches. Every random choice for a sample comes from the sample's own generator.

    Args:
        encoder: encodes images, or each frame of a video.
        device: where the inputs are wanted.
        is_labelled: the model is conditioned on the batch's "label".
        captions: encodes the batch's "caption", unless the batch already has the features.
        null_text: features of the empty caption (1, L, ...), used for dropped captions.
        caption_dropout_prob: probability in [0, 1) that a caption is dropped.
        masks: makes a hole in each sample, for the model to fill; see `draw_hole`.
        teacher: makes features of the samples, unless the batch already has them.
        low_resolution: makes the low-resolution input of a super-resolution model.
    """

    def __init__(  # noqa: PLR0913 - what a batch may have, one by one
        self,
        encoder: Encoder,
        device: torch.device,
        *,
        is_labelled: bool,
        captions: CaptionSource | None = None,
        null_text: Mapping[str, Tensor] | None = None,
        caption_dropout_prob: float = 0.0,
        masks: Any = None,
        teacher: FeatureSource | None = None,
        low_resolution: LowResolutionSource | None = None,
    ) -> None:
        self.encoder, self.device, self.captions = encoder, device, captions
        self._is_labelled, self._null_text, self._dropout = is_labelled, null_text, caption_dropout_prob
        self._masks, self._teacher, self._low_resolution = masks, teacher, low_resolution

    @property
    def num_cut_captions(self) -> int | None:
        """Number of captions cut so far on this rank; None if no captions are encoded."""
        return None if self.captions is None else self.captions.num_cut

    def encode(self, batch: Mapping[str, Any], generators: Generators) -> ModelInputs:
        """The model's inputs for a batch of the loader.

        Args:
            batch: "image" (B, C, H, W) or "video" (B, C, F, H, W) in [-1, 1], "voxels" (B, C, D, H, W) or
                "points" (B, C, N), or their cached latents. If the model wants them, "label", int64 (B,), and
                "caption" or its cached features.
            generators: one per sample, on the device.

        Raises:
            ValueError: the model needs captions or images, and the batch has none.
        """
        on_device = {
            key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        # Drawn before the encoder draws, so that the noise is the same with cached latents.
        noise = standard_noise(self._latent_shape(on_device), generators, self.device)
        condition = self._condition(on_device, generators)
        latents = self._latents(on_device, generators)
        if self._masks is not None:
            condition = with_extra(condition, self._hole(on_device, generators))
        if self._low_resolution is not None:
            condition = with_entries(condition, self._low_resolution.of_batch(on_device, generators))
        return ModelInputs(latents, noise, condition, self._features(on_device))

    def _features(self, batch: Mapping[str, Any]) -> Tensor | None:
        if self._teacher is None or not self._teacher.is_wanted:
            return None
        if FEATURES in batch:
            features: Tensor = batch[FEATURES]
            return features
        if "image" in batch:
            return self._teacher.encode(batch["image"])
        if "video" not in batch:
            raise ValueError(
                f"alignment needs images, or a cache with features, got batches of {', '.join(sorted(batch))}"
            )
        frames = rearrange(batch["video"], "b c f h w -> (b f) c h w")
        made = torch.cat([self._teacher.encode(part) for part in frames.split(FRAMES_AT_ONCE)])
        return rearrange(made, "(b f) d h w -> b f d h w", b=len(batch["video"]))

    def _hole(self, batch: Mapping[str, Any], generators: Generators) -> Tensor:
        key = hole_key(batch)
        samples: Tensor = batch[key]
        drawn = [draw_hole(self._masks, key, samples.shape[2:], generator) for generator in generators]
        mask = torch.stack(drawn).unsqueeze(1).to(self.device)  # (B, 1, [F,] H, W)
        return masked_latents(self.encoder, samples, mask, generators)

    def _latent_shape(self, batch: Mapping[str, Any]) -> tuple[int, ...]:
        if "latent_mean" in batch:
            return tuple(batch["latent_mean"].shape)
        shape = _shape_in(batch)
        if shape is not None:
            sides = (side // self.encoder.downsample for side in shape.shape[2:])
            return (len(shape), self.encoder.channels, *sides)
        pixels = batch["image"] if "image" in batch else batch["video"]
        height, width = (side // self.encoder.downsample for side in pixels.shape[-2:])
        return (len(pixels), self.encoder.channels, *pixels.shape[2:-2], height, width)

    def _latents(self, batch: Mapping[str, Any], generators: Generators) -> Tensor:
        if "latent_mean" in batch:
            return sample_latents(batch["latent_mean"], batch["latent_std"], generators)
        shape = _shape_in(batch)
        with torch.no_grad():
            if shape is not None:
                return self.encoder.encode(shape, list(generators))
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


def _shape_in(batch: Mapping[str, Any]) -> Tensor | None:
    """The voxels or points of a batch; None if it has images or videos."""
    return next((batch[layout] for layout in SHAPES if layout in batch), None)


def masked_latents(encoder: Encoder, samples: Tensor, mask: Tensor, generators: Generators) -> Tensor:
    """What an inpainting model sees besides x: mask and latents of the masked sample, (B, 1 + C, [F,] h, w).

    Source: Stable Diffusion's inpainting model has this order and meaning.

    Args:
        encoder: encodes the masked samples.
        samples: images (B, channels, H, W), videos (B, channels, F, H, W) or voxels, in [-1, 1].
        mask: (B, 1, ...) with their other axes, 1 in the hole. There the samples become 0, mid-grey.
        generators: one per sample.
    """
    known = samples * (1 - mask)
    with torch.no_grad():
        if _is_video(encoder, known):
            rest = encode_video(encoder, known, generators)
        else:
            rest = encoder.encode(known, list(generators))
    return torch.cat([functional.interpolate(mask, rest.shape[2:], mode="nearest"), rest], dim=1)


def with_extra(condition: Condition, extra: Tensor) -> Condition:
    """The condition as a mapping that also has "extra". Labels become "label"."""
    return with_entries(condition, {"extra": extra})


def with_entries(condition: Condition, entries: Mapping[str, Tensor]) -> Condition:
    """The condition as a mapping that also has these entries. Labels become "label"."""
    if isinstance(condition, Tensor):
        return {"label": condition, **entries}
    return {**(condition or {}), **entries}


def encode_video(encoder: Encoder, videos: Tensor, generators: Generators) -> Tensor:
    """Videos (B, C, F, H, W) in [-1, 1] -> latents (B, c, F, h, w), `FRAMES_AT_ONCE` frames at a time.

    Args:
        encoder: encodes the frames.
        videos: (B, C, F, H, W).
        generators: one per video. The frames of a video draw from it one after the other.
    """
    B, _, F, _, _ = videos.shape
    frames = rearrange(videos, "b c f h w -> (b f) c h w")
    each = [generator for generator in generators for _ in range(F)]
    parts = [slice(first, first + FRAMES_AT_ONCE) for first in range(0, B * F, FRAMES_AT_ONCE)]
    latents = [encoder.encode(frames[part], each[part]) for part in parts]
    return rearrange(torch.cat(latents), "(b f) c h w -> b c f h w", b=B)


def decoded(encoder: Encoder, latents: Tensor) -> Tensor:
    """Latents of images, videos or shapes (B, c, ...) -> samples (B, C, ...), as the encoder makes them."""
    return decode_video(encoder, latents) if _is_video(encoder, latents) else encoder.decode(latents)


def _is_video(encoder: Encoder, samples: Tensor) -> bool:
    """Whether samples, or their latents, are videos: solids have as many axes, and encoders of their own."""
    return samples.ndim == 5 and getattr(encoder, "layout", IMAGES) == IMAGES


def decode_video(encoder: Encoder, latents: Tensor) -> Tensor:
    """Latents (B, c, F, h, w) -> videos (B, C, F, H, W), near [-1, 1], `FRAMES_AT_ONCE` frames at a time."""
    parts = rearrange(latents, "b c f h w -> (b f) c h w").split(FRAMES_AT_ONCE)
    frames = torch.cat([encoder.decode(part) for part in parts])
    return rearrange(frames, "(b f) c h w -> b c f h w", b=len(latents))


def standard_noise(shape: Sequence[int], generators: Generators, device: torch.device) -> Tensor:
    """Standard normal noise in the shape (B, ...), float32. Each sample's comes from its own generator."""
    noise = torch.empty(tuple(shape), device=device)
    for row, generator in zip(noise, generators, strict=True):
        torch.randn(row.shape, generator=generator, out=row)
    return noise
