"""Three layers in place of timm's, for hosts whose model is made of them, where timm is not installed.

Dims: B batch, N tokens, D width.
"""

import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


class PatchEmbed(nn.Module):
    """Square patches of an image, as tokens (B, N, D)."""

    def __init__(self, size: int, patch_size: int, channels: int, width: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (size // patch_size) ** 2
        self.proj = nn.Conv2d(channels, width, patch_size, patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).mT


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, num_heads: int, **_: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            each.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1)
        )
        attended: Tensor = self.proj(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return attended


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Any, drop: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(in_features, hidden_features), act_layer(), nn.Linear(hidden_features, in_features)
        )

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.layers(x)
        return answer


def install() -> list[str]:
    """Puts the layers where timm has them, unless it is installed. Returns the packages replaced."""
    if find_spec("timm") is not None:
        return []
    for name in ("timm", "timm.models", "timm.models.vision_transformer"):
        sys.modules[name] = ModuleType(name)
    layers = {"PatchEmbed": PatchEmbed, "Attention": Attention, "Mlp": Mlp}
    vars(sys.modules["timm.models.vision_transformer"]).update(layers)
    return ["timm"]
