"""Weights from files, and the encoder between images and what the model is trained on.

Dims: `B` batch, `C` latent channels, `H`, `W` edges of the image, `h`, `w` those of the latent.
"""

import argparse
import collections
import hashlib
import pickle
import re
import typing
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from speedit_plugins.registry import ENCODERS, nearest

# Where a training checkpoint of facebookresearch/DiT or SpeeDiT keeps its two sets of weights.
WEIGHT_SETS = ("ema", "model")


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; names of parameters and buffers."""

    loaded: tuple[str, ...]
    left_at_init: tuple[str, ...]
    """In the model, but not in the file, or there with another shape."""
    unused: tuple[str, ...]
    """In the file, but not in the model, or there with another shape."""


def load_weights(
    model: nn.Module, path: str | Path, *, prefer: str = "ema", allow_mismatch: Sequence[str] = ()
) -> LoadReport:
    """Copies the weights of a checkpoint into the model, in the model's own dtype and device.

    Args:
        model: with memory behind its parameters (not on the meta device).
        path: see `read_checkpoint`.
        prefer: see `read_checkpoint`.
        allow_mismatch: beginnings of names that may differ; "y_embedder." to fine-tune on other classes.

    Raises:
        ValueError: the file cannot be read; names or shapes differ outside `allow_mismatch` (they are listed,
            and nothing is copied); an entry of `allow_mismatch` begins no name.
    """
    wanted, found = model.state_dict(), read_checkpoint(path, prefer=prefer)
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError(
            "load_weights got a model on the meta device; wanted one with memory: model.to_empty(device=...)"
        )
    _check_prefixes(allow_mismatch, wanted, found)
    loaded = [name for name in wanted if name in found and found[name].shape == wanted[name].shape]
    left_at_init = [name for name in wanted if name not in loaded]
    unused = [name for name in found if name not in loaded]
    excused = tuple(allow_mismatch)
    faults = [name for name in dict.fromkeys((*left_at_init, *unused)) if not name.startswith(excused)]
    if faults:
        listed = [f"{name}: {_shape(found, name)}, wanted {_shape(wanted, name)}" for name in faults[:3]]
        rest = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(
            f"'{path}' does not fit the model: {'; '.join(listed)}{rest}; wanted the model's keys of the run"
            " that wrote it (config.yaml beside a checkpoint)"
        )
    model.load_state_dict({name: found[name] for name in loaded}, strict=False)
    return LoadReport(tuple(loaded), tuple(left_at_init), tuple(unused))


def read_checkpoint(path: str | Path, *, prefer: str = "ema") -> dict[str, Tensor]:
    """Weights by name, on the CPU.

    Args:
        path: a .safetensors file; or what `torch.save` wrote: a bare state dict, or a training checkpoint of
            facebookresearch/DiT or SpeeDiT (a dict with "model", "ema", "opt", "args"). No code in it is run.
        prefer: which weights of a training checkpoint to take, "ema" or "model". Other files hold one set.

    Raises:
        ValueError: no such file, a damaged one, one that holds more than weights and plain settings, or one
            without the preferred weights.
    """
    if prefer not in WEIGHT_SETS:
        raise ValueError(
            f"prefer needs one of {', '.join(WEIGHT_SETS)}, got {prefer!r}{nearest(prefer, WEIGHT_SETS)}"
        )
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at '{path}': not a file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"'{path}' is damaged or no safetensors file: {first_line(error)}") from error
    content = _unpickle(path)
    if isinstance(content, Mapping) and any(isinstance(content.get(key), Mapping) for key in WEIGHT_SETS):
        if not isinstance(content.get(prefer), Mapping):
            raise ValueError(f"'{path}' holds no {prefer!r} weights, got keys {sorted(map(str, content))}")
        content = content[prefer]
    if not isinstance(content, Mapping) or not content or not all(map(torch.is_tensor, content.values())):
        what = (
            f"keys {sorted(map(str, content))[:8]}"
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise ValueError(
            f"'{path}' holds {what}, wanted a state dict, or a dict with one under 'ema' or 'model'"
        )
    return {str(name): tensor.detach() for name, tensor in content.items()}


def first_line(error: Exception) -> str:
    """Of the error's message; its kind where it has none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def loading_advice(allow_download: bool) -> str:
    """What to try where a library found no saved model."""
    if allow_download:
        return "check the name and the network"
    return "give the folder of a saved one, or set allow_download: true to fetch a hub name"


def _unpickle(path: Path) -> Any:
    """What `torch.save` wrote, restricted to tensors, plain values, Namespace and OmegaConf containers."""
    try:
        with torch.serialization.safe_globals(_settings_classes()):
            # Mapped, so that the optimizer state of a training checkpoint is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is not None:
            raise ValueError(
                f"'{path}' is refused: it asks for {name[1]}, which is neither a tensor nor a plain setting; "
                "a file that needs it could run any code"
            ) from error
        raise ValueError(f"'{path}' is refused or damaged: {first_line(error)}") from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"'{path}' is damaged or no file of torch.save: {first_line(error)}") from error


def _settings_classes() -> list[Any]:
    """Classes without side effects in which training scripts pickle their settings."""
    classes: list[Any] = [argparse.Namespace]
    try:
        from omegaconf import DictConfig, ListConfig, base, nodes
    except ImportError:
        return classes
    scalars = (
        nodes.AnyNode,
        nodes.StringNode,
        nodes.IntegerNode,
        nodes.FloatNode,
        nodes.BooleanNode,
        nodes.BytesNode,
    )
    # A container names its element types: these, and the built-in ones.
    types = (typing.Any, dict, list, tuple, int, float, bool, str, bytes, collections.defaultdict)
    return [*classes, DictConfig, ListConfig, base.ContainerMetadata, base.Metadata, *scalars, *types]


def _check_prefixes(
    prefixes: Sequence[str], wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Raises ValueError for a prefix that begins no name: it would be an option without effect."""
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in (*wanted, *found)):
            known = sorted({name.split(".")[0] for name in wanted})
            raise ValueError(
                f"allow_mismatch {prefix!r} begins no parameter's name{nearest(prefix, known)}; "
                f"names begin with: {', '.join(known)}"
            )


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"shape {tuple(tensors[name].shape)}" if name in tensors else "nothing"


class Autoencoder(nn.Module):
    """A frozen diffusers `AutoencoderKL`: latents have its own channel count, scale and shift.

    Attributes: `channels` is C, `downsample` is H / h.

    Args:
        path: folder of a saved AutoencoderKL in safetensors form, or a hub name.
        subfolder: of `path`, where the autoencoder is part of a pipeline ("vae").
        allow_download: let a hub name be fetched; otherwise only what is on this machine is read.

    Raises:
        ValueError: no such autoencoder on this machine, or it cannot be fetched.
    """

    def __init__(self, path: str, *, subfolder: str | None = None, allow_download: bool = False) -> None:
        super().__init__()
        # Imported here: it takes seconds, and runs in pixel space do without it.
        from diffusers import AutoencoderKL

        try:
            # Safetensors alone: diffusers would fall back to a pickle. Saving memory needs another package.
            model = AutoencoderKL.from_pretrained(
                path,
                subfolder=subfolder,
                local_files_only=not allow_download,
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no AutoencoderKL in safetensors form found at '{path}' on this machine"
                f"{' or the hub' if allow_download else ''}; {loading_advice(allow_download)}"
            ) from error
        self.model = model.requires_grad_(False).eval()
        self.channels, self.image_channels = int(model.config.latent_channels), int(model.config.in_channels)
        self.downsample = 2 ** (len(model.config.block_out_channels) - 1)
        self.scaling_factor = float(model.config.scaling_factor)
        self.shift_factor = float(model.config.shift_factor or 0.0)

    def train(self, mode: bool = True) -> "Autoencoder":
        """Stays in evaluation: a frozen encoder has no training mode."""
        return super().train(False)

    @torch.no_grad()
    def encode(
        self, images: Tensor, generators: list[torch.Generator] | torch.Generator | None = None
    ) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> a sample of their latents (B, C, h, w), near unit variance.

        Args:
            images: see `posterior`.
            generators: one per image, or one for all; None draws from torch's global one.
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
        """Mean and standard deviation (B, C, h, w) of the latents, scaled and shifted, in the images' dtype.

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
        """Sha256, in hexadecimal, of what decides the latents: the kind, its scale and shift, the weights."""
        digest = hashlib.sha256(f"AutoencoderKL {self.scaling_factor} {self.shift_factor}".encode())
        for name, weights in sorted(self.model.state_dict().items()):
            digest.update(f"\n{name} {weights.dtype} {tuple(weights.shape)}\n".encode())
            digest.update(weights.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) as `encode` scales them -> images (B, 3, H, W), about [-1, 1], not clamped."""
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
    """Trains on the images themselves.

    Args:
        channels: of the images, 1 or 3.
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
        """Images (B, channels, H, W), unchanged; nothing is drawn."""
        return self._checked(images)

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The images (B, channels, H, W) as mean, and a standard deviation of 0."""
        return self._checked(images), torch.zeros_like(images)

    def fingerprint(self) -> str:
        """Sha256, in hexadecimal, of what decides the latents: the kind and its channels."""
        return hashlib.sha256(f"Pixels {self.channels}".encode()).hexdigest()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, channels, H, W), unchanged."""
        return self._checked(latents)

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"Pixels got images of shape {tuple(images.shape)}, wanted (B, {self.channels}, H, W)"
            )
        return images


ENCODERS.register_module(name="AutoencoderKL", module=Autoencoder)
ENCODERS.register_module(name="Pixels", module=Pixels)
