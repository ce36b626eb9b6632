"""What a super-resolution model sees besides x: the sample in a lower resolution, and the noise on it.

The low-resolution images are made in pixels, by averaging squares of pixels. They are enlarged to the size of
the sample, encoded as the sample is, and noised. The model takes the result by channels, beside x, as in SR3,
Saharia et al. 2021, arXiv:2104.07636; it is told the level of the noise, see `diffusion.augmentation`. That
the noise comes after the enlarging is as in DeepFloyd IF.

Dims: `B` samples, `C` channels, `F` frames (absent for images), `H`, `W` sides in pixels, `h`, `w` sides of
the latent.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from speedit_plugins.trainer.build import build_process
from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.data.loader import AUGMENTATION_STREAM, stream_seed
from speedit_plugins.trainer.diffusion.augmentation import NoiseAugmentation
from speedit_plugins.trainer.inputs import Encoder, Generators, encode_video, standard_noise


class LowResolution:
    """Makes the low-resolution input of training samples, and of low-resolution images that are given.

    Args:
        encoder: encodes the enlarged images.
        augmentation: noises them.
        factor: how many times a side is smaller, >= 2.
    """

    def __init__(self, encoder: Encoder, augmentation: NoiseAugmentation, *, factor: int) -> None:
        if factor < 2:
            raise ValueError(f"super_resolution needs a factor >= 2, got {factor}")
        self.encoder, self.augmentation, self.factor = encoder, augmentation, factor

    def of_batch(self, batch: Mapping[str, Any], generators: Generators) -> dict[str, Tensor]:
        """What joins the condition for a batch of the loader: see `of`, at levels that are drawn.

        The draws are from streams beside those of the generators, which stay as they were.

        Args:
            batch: "image" (B, C, H, W) or "video" (B, C, F, H, W) in [-1, 1], on the device.
            generators: one per sample, on the device.

        Raises:
            ValueError: the batch has neither, as with cached latents, or a side is no multiple of the factor.
        """
        name = next((each for each in ("image", "video") if each in batch), None)
        if name is None:
            raise ValueError(
                f"super_resolution needs images or videos, got batches of {', '.join(sorted(batch))}"
            )
        own = [beside(generator) for generator in generators]
        drawn = [torch.rand(1, generator=each, device=each.device) for each in own]
        level = self.augmentation.levels(torch.cat(drawn).to(batch[name].device))
        return self.of(reduced(batch[name], self.factor), level, own)

    def of(self, images: Tensor, level: Tensor, generators: Generators) -> dict[str, Tensor]:
        """What joins the condition: "extra" (B, c, [F,] h, w), to be joined to x, and its "level" (B,).

        Args:
            images: low-resolution (B, C, [F,] H / factor, W / factor) in [-1, 1].
            level: of the noise, (B,), see `NoiseAugmentation`.
            generators: one per sample, on the device.
        """
        whole = enlarged(images, self.factor)
        with torch.no_grad():
            if whole.ndim == 5:
                encoded = encode_video(self.encoder, whole, generators)
            else:
                encoded = self.encoder.encode(whole, list(generators))
        noise = standard_noise(encoded.shape, generators, encoded.device)
        return {"extra": self.augmentation.corrupt(encoded, level, noise), "level": level.float()}


def build_low_resolution(config: ExperimentConfig, encoder: Encoder) -> LowResolution | None:
    """What makes the low-resolution inputs of the config; None without `super_resolution`."""
    options = config.super_resolution
    if not options.factor:
        return None
    augmentation = NoiseAugmentation(build_process(config, respaced=False), largest=options.augmentation)
    return LowResolution(encoder, augmentation, factor=options.factor)


def beside(generator: torch.Generator) -> torch.Generator:
    """A generator of the stream beside that of `generator`, which is not drawn from."""
    seed = stream_seed(generator.initial_seed(), AUGMENTATION_STREAM)
    return torch.Generator(generator.device).manual_seed(seed)


def reduced(pixels: Tensor, factor: int) -> Tensor:
    """The mean of each square of factor x factor pixels: (B, C, [F,] H, W) -> (..., H / factor, W / factor).

    Raises:
        ValueError: a side is no multiple of the factor.
    """
    if any(side % factor for side in pixels.shape[-2:]):
        raise ValueError(
            f"super_resolution.factor {factor} needs sides that are its multiples, got"
            f" {pixels.shape[-2]} x {pixels.shape[-1]} pixels"
        )
    return _by_frames(pixels, lambda frames: functional.avg_pool2d(frames, factor))


def enlarged(pixels: Tensor, factor: int) -> Tensor:
    """Bilinear enlargement: (B, C, [F,] h, w) -> (B, C, [F,] h factor, w factor)."""
    return _by_frames(
        pixels, lambda frames: functional.interpolate(frames, scale_factor=float(factor), mode="bilinear")
    )


def _by_frames(pixels: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The change of images, or of each frame of videos."""
    if pixels.ndim == 4:
        return change(pixels)
    frames = change(rearrange(pixels, "b c f h w -> (b f) c h w"))
    return rearrange(frames, "(b f) c h w -> b c f h w", b=len(pixels))
