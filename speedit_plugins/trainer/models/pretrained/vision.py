"""Frozen vision networks of transformers, from images to maps of features.

Dims: `B` images, `H`, `W` sides in pixels, `Z` width of a feature, `h'`, `w'` sides of the map.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.trainer.models.lora import fingerprint
from speedit_plugins.trainer.models.pretrained.saved_models import check_whole, reading

# By model_type. For these, transformers' AutoModel would also load a text tower.
_VISION_TOWERS = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}


class VisionNetwork(nn.Module):
    """The map of the patch features of a vision model such as DINOv2, CLIP, SigLIP or ViT.

    Images are resized to a square of `size` pixels as a whole, not cropped, and normalised as the model's
    image processor says. The network runs in float32.

    Attributes: `width` is Z, `size` the side in pixels.

    Args:
        path: folder of a saved model in safetensors form, or a hub name.
        size: side in pixels to resize to; None is the processor's own.
        allow_download: fetch a hub name; otherwise only files of this machine are read.

    Raises:
        ValueError: there is no such model with an image processor's config on this machine, a weight is
            missing or not finite, or it gives no map of features for images of this size.
    """

    def __init__(self, path: str, *, size: int | None = None, allow_download: bool = False) -> None:
        super().__init__()
        # Imported here because it takes seconds.
        import transformers
        from transformers.image_processing_utils import BaseImageProcessor

        options: dict[str, Any] = {"local_files_only": not allow_download}
        what = "alignment.teacher: no vision model with a preprocessor_config.json"
        with reading(what, path, "", allow_download=allow_download) as found:
            config = transformers.AutoConfig.from_pretrained(found, **options)
            kind = getattr(transformers, _VISION_TOWERS.get(config.model_type, "AutoModel"))
            prepared, _ = BaseImageProcessor.get_image_processor_dict(found, **options)
            model, info = kind.from_pretrained(
                found, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
            )
        check_whole(model, info, path)
        self.model = model.requires_grad_(False).eval()
        self.path, self.size = path, size or _side(prepared, path)
        for name in ("mean", "std"):
            values = torch.tensor(prepared.get(f"image_{name}") or [0.5] * 3).view(1, 3, 1, 1)
            self.register_buffer(name, values, persistent=False)
        self.width = self.encode(torch.zeros(1, 3, self.size, self.size)).shape[1]

    def train(self, mode: bool = True) -> "VisionNetwork":
        """Keeps the network in evaluation mode, since it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [-1, 1] -> features, float32 (B, Z, h', w'). Grey is repeated."""
        x = resized(images.float(), self.size) / 2 + 0.5
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        try:
            found: Tensor = self.model(pixel_values=x).last_hidden_state
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"alignment.teacher: the model at '{self.path}' does not take images of {self.size} pixels:"
                f" {reason}; wanted another alignment.teacher_size, or a vision model"
            ) from error
        return found.float() if found.ndim == 4 else self._as_map(found)

    def fingerprint(self) -> str:
        """SHA-256 of all that decides the features: class, size, mean, deviation and weights."""
        values = [self.get_buffer(name).flatten().tolist() for name in ("mean", "std")]
        text = f"{type(self.model).__name__} {self.size} {values} {fingerprint(self.model.state_dict())}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _as_map(self, tokens: Tensor) -> Tensor:
        """The last tokens (B, prefix + h' w', Z) as a map; class and register tokens come first."""
        patch = getattr(self.model.config, "patch_size", None)
        edge = self.size // patch if isinstance(patch, int) else 0
        if not 0 < edge * edge <= tokens.shape[1]:
            raise ValueError(
                f"alignment.teacher: the model at '{self.path}' gives {tokens.shape[1]} tokens with"
                f" patch_size {patch} for images of {self.size} pixels; wanted a token for each patch"
            )
        return rearrange(tokens[:, -edge * edge :], "b (h w) z -> b z h w", h=edge).float()


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, 1 or 3, H, W) as (B, 3, side, side), with antialiasing; other proportions are stretched."""
    images = images.expand(-1, 3, -1, -1)
    if images.shape[2:] == (side, side):
        return images
    return functional.interpolate(images, (side, side), mode="bicubic", antialias=True)


def _side(prepared: Mapping[str, Any], path: str) -> int:
    """The side in pixels of what an image processor gives."""
    for key in ("crop_size", "size"):
        value = prepared.get(key)
        if key == "crop_size" and not prepared.get("do_center_crop", value is not None):
            continue
        sides = [value] if isinstance(value, int) else list((value or {}).values())
        if sides and all(isinstance(side, int) for side in sides):
            return math.floor(min(sides))
    raise ValueError(
        f"alignment.teacher: the image processor at '{path}' names no size; wanted alignment.teacher_size"
    )
