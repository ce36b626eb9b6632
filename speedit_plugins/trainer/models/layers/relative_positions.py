"""Self-attention with a learned bias for the distance between two patches, and the block made of it.

Source: the relative positions of BEiT, Bao et al. 2021, arXiv:2106.08254, as MDT takes them over. The
parameters have the names of sail-sg/MDT.

Dims: `B` batch, `N` tokens, `K` tokens of a part of them, `H` heads, `D` width, `R` rows of the table.
"""

from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.blocks import Perceptron, modulate
from speedit_plugins.trainer.models.layers.linear import Linear

# BEiT has three more distances: from its class token, to it, and of it to itself. MDT has no such token, and
# keeps the rows.
NUM_UNUSED = 3


class RelativePositionBias(nn.Module):
    """A table with a number for each head and each distance on a square grid, (R, H), and where to find it.

    Args:
        edge: rows of the grid.
        num_heads: H.
    """

    def __init__(self, edge: int, num_heads: int) -> None:
        super().__init__()
        num_distances = (2 * edge - 1) ** 2 + NUM_UNUSED
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_distances, num_heads))
        self.register_buffer("relative_position_index", relative_index(edge))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the table from N(0, 0.02^2)."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, index: Tensor) -> Tensor:
        """The biases at rows of the table, (N, N) -> (1, H, N, N) or (B, K, K) -> (B, H, K, K)."""
        # The gradient of a selected column is a plain sum; that of `table[index]` takes twice the time.
        found = self.relative_position_bias_table.t().index_select(1, index.flatten())  # (H, ...)
        batch, size = (len(index) if index.ndim == 3 else 1), index.shape[-1]
        return found.view(-1, batch, size, size).transpose(0, 1)


def relative_index(edge: int) -> Tensor:
    """The row of the table for each pair of patches in a square grid, row-major: int64 (N, N)."""
    place = torch.arange(edge)
    distance = place.unsqueeze(1) - place + edge - 1  # (edge, edge), >= 0
    down, right = distance[:, None, :, None], distance[None, :, None, :]
    return (down * (2 * edge - 1) + right).reshape(edge**2, edge**2)


def index_of(kept: Tensor, index: Tensor) -> Tensor:
    """The rows of the table for each pair of the kept patches, (B, K) and (N, N) -> (B, K, K)."""
    return index[kept.unsqueeze(2), kept.unsqueeze(1)]


class BiasedAttention(nn.Module):
    """Multi-head self-attention with a relative position bias: x (B, N, D), index (N, N) -> (B, N, D).

    Args:
        hidden_size: D, a multiple of H.
        num_heads: H.
        edge: rows of the grid of patches.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, edge: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.rel_pos_bias = RelativePositionBias(edge, num_heads)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        qkv = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        query, key, value = qkv.unbind(0)
        bias = self.rel_pos_bias(index).to(query.dtype)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return cast(Tensor, self.proj(rearrange(mixed, "b h n k -> b n (h k)")))


class BiasedBlock(nn.Module):
    """A DiT block with that attention, and optionally a linear layer that merges a long skip connection.

    x (B, N, D), c (B, D), index (N, N) or (B, N, N) of `relative_index`, skip (B, N, D) -> (B, N, D).
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, mlp_ratio: float, edge: int, has_skip: bool = False
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attn = BiasedAttention(hidden_size, num_heads, edge=edge)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Perceptron(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))
        self.skip_linear = Linear(2 * hidden_size, hidden_size) if has_skip else None

    def forward(self, x: Tensor, c: Tensor, index: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            # Under autocast the layer's own type is narrower than that of the residual stream.
            x = self.skip_linear(torch.cat([x, skip], dim=-1)).to(x.dtype)
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # six of (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        x = torch.addcmul(x, gate_attn, self.attn(modulate(self.norm1(x), shift_attn, scale_attn), index))
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))
