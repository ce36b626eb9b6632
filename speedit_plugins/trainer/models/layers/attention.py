"""Self-attention of a transformer block, with a kernel chosen by name.

Dims: `B` batch, `N` tokens, `H` heads, `K` width of a head, `D` = H K.
"""

import importlib
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.registry import nearest
from speedit_plugins.trainer.models.layers.linear import Linear
from speedit_plugins.trainer.models.layers.rotary import Rotation
from speedit_plugins.trainer.models.layers.sequence import WHOLE, WholeTokens

AttentionKernel = Callable[[Tensor], Tensor]
"""Softmax attention over packed queries, keys and values: (B, N, 3, H, K) -> (B, N, H, K)."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with parameters `qkv` (3D, D) and `proj` (D, D).

    Args:
        hidden_size: D, a multiple of H.
        num_heads: H.
        kernel: an attention kernel, from `attention_kernel`.
        qk_norm: makes a norm of this width for the queries of every head, `q_norm`, and one for the keys,
            `k_norm`; None leaves both as they are. Source: Dehghani et al. 2023, arXiv:2302.05442.
    """

    # Whether ranks that share a sample exchange its tokens here.
    is_shared = True

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kernel: AttentionKernel,
        qk_norm: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel = kernel
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.q_norm = None if qk_norm is None else qk_norm(hidden_size // num_heads)
        self.k_norm = None if qk_norm is None else qk_norm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rotation: Rotation | None = None, split: WholeTokens = WHOLE) -> Tensor:
        """(B, N, D) -> (B, N, D), with queries and keys turned by the rotation of the N tokens.

        Args:
            x: all tokens, or this rank's part of them.
            rotation: of the same tokens.
            split: which of all tokens they are.
        """
        qkv = rearrange(self.qkv(x), "b n (three h k) -> b n three h k", three=3, h=self.num_heads)
        if self.q_norm is not None or rotation is not None:
            qkv = self._changed(qkv, rotation)
        mixed = rearrange(split.attend(self.kernel, qkv), "b n h k -> b n (h k)")
        return cast(Tensor, self.proj(mixed))

    def _changed(self, qkv: Tensor, rotation: Rotation | None) -> Tensor:
        """Queries and keys normed, then turned: (B, N, 3, H, K) -> (B, N, 3, H, K)."""
        query, key, value = qkv.unbind(2)
        if self.q_norm is not None and self.k_norm is not None:
            # Under autocast the norms return float32.
            query, key = self.q_norm(query).to(value.dtype), self.k_norm(key).to(value.dtype)
        if rotation is not None:
            query, key = rotation.turned(query), rotation.turned(key)
        return torch.stack((query, key, value), dim=2)


def attention_kernel(name: str, *, head_size: int = 64) -> AttentionKernel:
    """The attention kernel of this name.

    A kernel from an optional package is first called on a small tensor, to find out whether it runs here.

    Args:
        name: a key of `ATTENTION_KERNELS`.
        head_size: K of the trial call.

    Raises:
        ValueError: the name is unknown, or this machine cannot run the kernel.
    """
    if name not in ATTENTION_KERNELS:
        known = ", ".join(sorted(ATTENTION_KERNELS))
        raise ValueError(f"unknown attention '{name}'{nearest(name, ATTENTION_KERNELS)}; known: {known}")
    kernel = ATTENTION_KERNELS[name]
    if kernel is not sdpa:
        _probe(name, kernel, head_size)
    return kernel


def sdpa(qkv: Tensor) -> Tensor:
    """Attention through `torch.nn.functional.scaled_dot_product_attention`."""
    # The backward pass of unbind stacks the three gradients in one copy; that of a permutation does not.
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, K) each
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # (B, N, H, K)


def xformers_attention(qkv: Tensor) -> Tensor:
    """Attention through `xformers.ops.memory_efficient_attention`."""
    operations = importlib.import_module("xformers.ops")
    query, key, value = qkv.unbind(2)
    return cast(Tensor, operations.memory_efficient_attention(query, key, value))


ATTENTION_KERNELS: dict[str, AttentionKernel] = {"sdpa": sdpa, "xformers": xformers_attention}


def _probe(name: str, kernel: AttentionKernel, head_size: int) -> None:
    """Calls the kernel on the device that a training run would use, and raises ValueError if that fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.no_grad():
            kernel(torch.zeros(1, 8, 3, 1, head_size, device=device))
    except ImportError as error:
        raise ValueError(
            f"attention '{name}' needs the package {name}, but it cannot be imported ({error}); "
            f"install speedit-plugins[{name}] or use attention 'sdpa'"
        ) from error
    # A package that was built for another device or another torch raises one of these when called.
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"attention '{name}' is installed but has no kernel for device '{device}' with heads of size"
            f" {head_size}; use attention 'sdpa'"
        ) from error
