"""The parts of a diffusion transformer: patch embedding, block with adaLN-Zero, last layer.

Source: Peebles and Xie 2022, arXiv:2212.09748. The parameters have the names of facebookresearch/DiT.

Dims: `B` batch, `C` channels, `h`, `w` sides of the input, `N` tokens, `D` width, `P` side of a patch.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.trainer.models.attention import AttentionKernel, SelfAttention
from speedit_plugins.trainer.models.linear import Linear


class Block(nn.Module):
    """Attention, then a perceptron, each modulated and gated by c: x (B, N, D), c (B, D) -> (B, N, D).

    If the `attention` takes (B, F, N, D), the block does too, and c is (B, 1, D).
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mlp_ratio: float,
        kernel: AttentionKernel,
        attention: type[SelfAttention] = SelfAttention,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = attention(hidden_size, num_heads, kernel=kernel)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Perceptron(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # six of (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = torch.addcmul(x, gate_attn, self.attn(modulate(self.norm1(x), shift_attn, scale_attn)))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated norm and projection to pixels: x (B, N, D), c (B, D) -> (B, N, P P out_channels).

    For a clip, x (B, F, N, D) and c (B, 1, D) -> (B, F, N, P P out_channels).
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        return cast(Tensor, self.linear(modulate(self.norm_final(x), shift, scale)))


class Perceptron(nn.Module):
    """Linear layer `fc1`, GELU in its tanh form, linear layer `fc2`: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class PatchEmbedder(nn.Module):
    """Maps each P x P patch linearly to a token, in row-major order: (B, C, h, w) -> (B, N, D).

    The weight has the form of the equivalent convolution's, `proj.weight` (D, C, P, P).
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """Draws the weight Xavier-uniform, as for a linear layer of C P P inputs, and zeros the bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        patches = patches_of(x, self.proj.kernel_size[0])  # (B, N, C P P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


def patches_of(x: Tensor, edge: int) -> Tensor:
    """The values of each patch in a contiguous tensor, (B, C, h, w) -> (B, N, C P P).

    A convolution would return tokens with the channels first in memory, and every later elementwise operation
    of the residual stream would inherit these strides. `F.unfold` launches a kernel per row on a CUDA device.

    Args:
        edge: P; h and w are multiples of it.
    """
    return rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=edge, q=edge)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, for x (B, N, D), and shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, scale + 1)
