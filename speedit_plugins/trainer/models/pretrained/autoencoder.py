"""Encoders between images and the latents that the model is trained on.

Dims: `B` batch, `C` latent channels, `H`, `W` sides of an image, `h`, `w` sides of its latent.
"""

import hashlib
from typing import cast

import torch
from torch import Tensor, nn

from speedit_plugins.registry import ENCODERS
from speedit_plugins.trainer.models.pretrained.saved_models import check_whole, reading


class Autoencoder(nn.Module):
    """A frozen `AutoencoderKL` of diffusers, whose config gives the latents' channels, scale and shift.

    Attributes: `channels` is C, `image_channels` counts the channels of an image, `downsample` is H / h.

    Args:
        path: folder of a saved AutoencoderKL in safetensors form, or a hub name.
        subfolder: folder of the autoencoder inside `path`, if that is a pipeline ("vae").
        allow_download: fetch a hub name; otherwise only files of this machine are read.

    Raises:
        ValueError: there is no such autoencoder on this machine, or it cannot be fetched, or a weight is
            missing or not finite.
    """

    def __init__(self, path: str, *, subfolder: str | None = None, allow_download: bool = False) -> None:
        super().__init__()
        # Imported here because it takes seconds, and runs in pixel space do not need it.
        from diffusers import AutoencoderKL

        what = "no AutoencoderKL in safetensors form"
        with reading(what, path, subfolder or "", allow_download=allow_download) as found:
            # Without use_safetensors diffusers would read a pickle; low_cpu_mem_usage needs accelerate.
            model, info = AutoencoderKL.from_pretrained(
                found,
                subfolder=subfolder,
                local_files_only=not allow_download,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        check_whole(model, info, path)
        self.model = model.requires_grad_(False).eval()
        self.channels, self.image_channels = int(model.config.latent_channels), int(model.config.in_channels)
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)
        self.scaling_factor = float(model.config.scaling_factor)
        self.shift_factor = float(model.config.shift_factor or 0.0)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Keeps the encoder in evaluation mode, since it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(
        self, images: Tensor, generators: list[torch.Generator] | torch.Generator | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> a sample of their latents (B, C, h, w), near unit variance.

        Args:
            images: as in `posterior`.
            generators: one per image, or one for the whole batch; None draws from torch's global generator.
        """
        from diffusers.utils.torch_utils import randn_tensor

        if isinstance(generators, list) and len(generators) != len(images):
            raise ValueError(
                f"the autoencoder needs one generator per image, {len(images)}, got {len(generators)}"
            )
        mean, std = self.posterior(images)
        noise = randn_tensor(mean.shape, generator=generators, device=mean.device, dtype=mean.dtype)
        return cast(Tensor, mean + std * noise)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the scaled and shifted latents, in the images' dtype.

        Args:
            images: (B, 3, H, W) in [-1, 1], H and W multiples of `downsample`.
        """
        edge, channels = self.downsample, int(self.model.config.in_channels)
        if (
            images.ndim != 4
            or images.shape[1] != channels
            or images.shape[2] % edge
            or images.shape[3] % edge
        ):
            raise ValueError(
                f"the autoencoder got images of shape {tuple(images.shape)}, "
                f"wanted (B, {channels}, H, W) with H and W multiples of {edge}"
            )
        gaussian = self.model.encode(images.to(self.model.dtype)).latent_dist
        mean, std = gaussian.mean.to(images.dtype), gaussian.std.to(images.dtype)
        return (mean - self.shift_factor) * self.scaling_factor, std * self.scaling_factor

    def fingerprint(self) -> str:
        """Sha256 in hexadecimal of all that decides the latents: class name, scale, shift and weights."""
        digest = hashlib.sha256(f"AutoencoderKL {self.scaling_factor} {self.shift_factor}".encode())
        for name, weights in sorted(self.model.state_dict().items()):
            digest.update(f"\n{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
            digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w), scaled as by `encode` -> images (B, 3, H, W), near [-1, 1], not clamped."""
        if latents.ndim != 4 or latents.shape[1] != self.channels:
            raise ValueError(
                f"the autoencoder got latents of shape {tuple(latents.shape)}, "
                f"wanted (B, {self.channels}, h, w)"
            )
        images = self.model.decode(
            (latents / self.scaling_factor + self.shift_factor).to(self.model.dtype)
        ).sample
        return cast(Tensor, images.to(latents.dtype))


class Pixels(nn.Module):
    """The encoder that changes nothing: the model is trained on the images themselves.

    Args:
        channels: channels of an image, 1 or 3.
    """

    downsample = 1

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"Pixels needs channels 1 or 3, got {channels}")
        self.channels = self.image_channels = channels

    def encode(
        self, images: Tensor, generators: list[torch.Generator] | torch.Generator | None = None
    ) -> Tensor:
        """Returns the images (B, channels, H, W) as they are, without a random draw."""
        return self._checked(images)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, channels, H, W) as the mean, with a standard deviation of 0."""
        return self._checked(images), torch.zeros_like(images)

    def fingerprint(self) -> str:
        """Sha256 in hexadecimal of all that decides the latents: class name and channels."""
        return hashlib.sha256(f"Pixels {self.channels}".encode()).hexdigest()

    def decode(self, latents: Tensor) -> Tensor:
        """Returns the latents (B, channels, H, W) as they are."""
        return self._checked(latents)

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"Pixels got images of shape {tuple(images.shape)}, wanted (B, {self.channels}, H, W)"
            )
        return images


ENCODERS.register_module(name="AutoencoderKL", module=Autoencoder)
ENCODERS.register_module(name="Pixels", module=Pixels)
