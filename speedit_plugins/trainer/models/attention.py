"""Self-attention of a transformer block, over a kernel chosen by name.

Dims: `B` batch, `N` tokens, `H` heads, `K` width of a head, `D` = H K.
"""

import importlib
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedit_plugins.registry import nearest
from speedit_plugins.trainer.models.linear import Linear

AttentionKernel = Callable[[Tensor], Tensor]
"""Softmax attention of packed queries, keys and values: (B, N, 3, H, K) -> (B, N, H, K)."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with parameters `qkv` (3D, D) and `proj` (D, D).

    Args:
        hidden_size: D.
        num_heads: H; divides D.
        kernel: what `attention_kernel` returns.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, kernel: AttentionKernel) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.kernel = kernel
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, width // self.num_heads)
        mixed = self.kernel(qkv).reshape(batch, tokens, width)  # (B, N, D)
        return cast(Tensor, self.proj(mixed))


def attention_kernel(name: str, *, head_size: int = 64) -> AttentionKernel:
    """The kernel of this name, called once on a small tensor where it is an optional package.

    Args:
        name: one of `ATTENTION_KERNELS`.
        head_size: K that the kernel is tried with.

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
    # Unbinding in place of a permutation lets the gradients of the three be stacked in one copy.
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, N, K) each
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)  # (B, N, H, K)


def xformers_attention(qkv: Tensor) -> Tensor:
    """Attention through `xformers.ops.memory_efficient_attention`."""
    operations = importlib.import_module("xformers.ops")
    query, key, value = qkv.unbind(2)
    return cast(Tensor, operations.memory_efficient_attention(query, key, value))


ATTENTION_KERNELS: dict[str, AttentionKernel] = {"sdpa": sdpa, "xformers": xformers_attention}


def _probe(name: str, kernel: AttentionKernel, head_size: int) -> None:
    """Calls the kernel on the device that a training run takes; raises ValueError where that fails."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with torch.no_grad():
            kernel(torch.zeros(1, 8, 3, 1, head_size, device=device))
    except ImportError as error:
        raise ValueError(
            f"attention '{name}' needs the package {name}, which cannot be imported ({error}); "
            f"install speedit-plugins[{name}] or take attention 'sdpa'"
        ) from error
    # A package built for another device or torch raises either of these when called.
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"attention '{name}' is installed but has no kernel for device '{device}' with heads of "
            f"{head_size}; take attention 'sdpa'"
        ) from error
