"""The parts of a diffusion transformer: patch embedding, block with adaLN-Zero, last layer.

Source: Peebles and Xie 2022, arXiv:2212.09748. The parameters have the names of facebookresearch/DiT.

Dims: `B` batch, `C` channels, `h`, `w` sides of the input, `N` tokens, `D` width, `P` side of a patch.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.registry import nearest
from speedit_plugins.trainer.models.layers.attention import AttentionKernel, SelfAttention
from speedit_plugins.trainer.models.layers.linear import Linear
from speedit_plugins.trainer.models.layers.rotary import Rotation
from speedit_plugins.trainer.models.layers.sequence import WHOLE, WholeTokens


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What the blocks of a model are made of. The defaults are DiT's.

    Source: Yao et al. 2025, arXiv:2501.01423.

    Args:
        norm: "layer", without weights, or "rms": RMSNorm with weights, Zhang and Sennrich 2019,
            arXiv:1910.07467. The last layer has the same.
        qk_norm: norm queries and keys, see `SelfAttention`, in the kind of `norm`, both with weights.
        rope: rotary positions, see `rotary`, beside the table that is added to the tokens.
        perceptron: "gelu", in its tanh form; "gelu_erf", in its exact form; or "swiglu": Shazeer 2020,
            arXiv:2002.05202, with 2/3 of the inner width, so that the number of weights stays.

    Raises:
        ValueError: a name is unknown.
    """

    norm: str = "layer"
    qk_norm: bool = False
    rope: bool = False
    perceptron: str = "gelu"

    def __post_init__(self) -> None:
        for option, name, known in (
            ("norm", self.norm, _NORMS),
            ("perceptron", self.perceptron, _PERCEPTRONS),
        ):
            if name not in known:
                listed = ", ".join(sorted(known))
                raise ValueError(f"unknown {option} {name!r}{nearest(name, known)}; known: {listed}")

    def norm_of(self, width: int) -> nn.Module:
        """The norm before an attention, a perceptron or the last layer."""
        return _NORMS[self.norm](width)

    def perceptron_of(self, width: int, inner_size: int) -> nn.Module:
        """The perceptron of a block."""
        return _PERCEPTRONS[self.perceptron](width, inner_size)

    @property
    def changed(self) -> tuple[str, ...]:
        """The options that are not DiT's, as in a config: "norm rms", "rope true"."""
        pairs = ((entry, getattr(self, entry.name)) for entry in fields(self))
        return tuple(f"{entry.name} {str(value).lower()}" for entry, value in pairs if value != entry.default)

    @property
    def head_norm(self) -> Callable[[int], nn.Module] | None:
        """Makes the norm of a head's queries or keys; None if there is none."""
        return _HEAD_NORMS[self.norm] if self.qk_norm else None


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
        attention: Callable[..., SelfAttention] = SelfAttention,
        options: BlockOptions | None = None,
    ) -> None:
        super().__init__()
        options = options or BlockOptions()
        self.norm1, self.norm2 = options.norm_of(hidden_size), options.norm_of(hidden_size)
        self.attn = attention(hidden_size, num_heads, kernel=kernel, qk_norm=options.head_norm)
        self.mlp = options.perceptron_of(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 6 * hidden_size))

    def forward(
        self, x: Tensor, c: Tensor, rotation: Rotation | None = None, split: WholeTokens = WHOLE
    ) -> Tensor:
        modulation = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)  # six of (B, 1, D)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation
        mixed = self.attn(modulate(self.norm1(x), shift_attn, scale_attn), rotation, split)
        x = torch.addcmul(x, gate_attn, mixed)
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Modulated norm and projection to pixels: x (B, N, D), c (B, D) -> (B, N, P P out_channels).

    For a clip, x (B, F, N, D) and c (B, 1, D) -> (B, F, N, P P out_channels).
    """

    def __init__(
        self, hidden_size: int, patch_size: int, out_channels: int, *, options: BlockOptions | None = None
    ) -> None:
        super().__init__()
        self.norm_final = (options or BlockOptions()).norm_of(hidden_size)
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


class ErfPerceptron(Perceptron):
    """The same layers with the exact GELU, by the error function: (B, N, D) -> (B, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x))))


class GatedPerceptron(nn.Module):
    """SwiGLU: w3(SiLU(a) b), with a and b the halves of w12(x): (B, N, D) -> (B, N, D).

    Each half has 2/3 of `inner_size`. The layers have the names of LightningDiT.
    """

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = Linear(hidden_size, 2 * (2 * inner_size // 3))
        self.w3 = Linear(2 * inner_size // 3, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return cast(Tensor, self.w3(F.silu(gate) * value))


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` in the dtype of its input: (..., D) -> (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast a head is in half precision and the weight is not. The fused kernel wants one dtype.
        return F.rms_norm(x, self.normalized_shape, cast(Tensor, self.weight).to(x.dtype), self.eps)


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


def _layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def _rms_norm(width: int) -> nn.Module:
    return RMSNorm(width, eps=1e-6)


_NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": _layer_norm, "rms": _rms_norm}
_HEAD_NORMS: dict[str, Callable[[int], nn.Module]] = {"layer": nn.LayerNorm, "rms": _rms_norm}
_PERCEPTRONS: dict[str, Callable[[int, int], nn.Module]] = {
    "gelu": Perceptron,
    "gelu_erf": ErfPerceptron,
    "swiglu": GatedPerceptron,
}
