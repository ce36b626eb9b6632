"""Loads the model file of a facebookresearch/DiT checkout without timm.

timm's three layers are written here anew, with its parameter names and its order of operations: a convolution
for the patches, fused scaled-dot-product attention, and dropout layers at probability 0.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch.nn.functional as F
from torch import Tensor, nn

CHECKOUT = "facebookresearch+DiT"


def load_original(hosts: Path) -> ModuleType:
    """The module `models` of the checkout `facebookresearch+DiT` in the folder `hosts`.

    Raises:
        ValueError: there is no such checkout.
    """
    source = hosts / CHECKOUT / "models.py"
    if not source.is_file():
        raise ValueError(f"no checkout of facebookresearch/DiT: {source} is not a file")
    layers = ModuleType("timm.models.vision_transformer")
    vars(layers).update(PatchEmbed=PatchEmbed, Attention=Attention, Mlp=Mlp)
    packages = {
        "timm": ModuleType("timm"),
        "timm.models": ModuleType("timm.models"),
        "timm.models.vision_transformer": layers,
    }
    spec = importlib.util.spec_from_file_location("original_dit_models", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, packages):
        spec.loader.exec_module(module)
    return module


class PatchEmbed(nn.Module):
    """Convolution over patches, flattened to (B, N, D)."""

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, bias=bias)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    """Packed projection, heads to the front by a permutation, fused attention, output projection."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        packed = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attn_drop.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, dropout_p=dropout)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).reshape(b, n, d)))


class Mlp(nn.Module):
    """Linear, activation, linear, with a dropout after each half."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
