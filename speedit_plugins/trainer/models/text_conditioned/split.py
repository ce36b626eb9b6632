"""Networks of diffusers whose tokens are split over ranks, see `models/layers/sequence.py`.

The tokens are split behind the layer that embeds the patches, and gathered behind the last one. Attention to
a caption needs no exchange: every rank has the caption.

Dims: `B` batch, `n` tokens of this rank, `D` width.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.attention import sdpa
from speedit_plugins.trainer.models.layers.sequence import WHOLE, WholeTokens, split_of


class SplitTokens:
    """How a network splits its tokens: not at all, until a forward pass begins with a split.

    A backward pass that recomputes blocks comes before the next forward pass, and finds the same split.

    Args:
        net: its `pos_embed` makes tokens, and its `proj_out` is the last layer. The attentions `attn1` of its
            blocks are among the tokens.
    """

    def __init__(self, net: nn.Module) -> None:
        self.split: WholeTokens = WHOLE
        cast(nn.Module, net.pos_embed).register_forward_hook(self._part)
        cast(nn.Module, net.proj_out).register_forward_hook(self._whole)
        for block in cast(nn.ModuleList, net.transformer_blocks):
            attention = cast(Any, block).attn1
            attention.set_processor(SplitAttention(self, attention.processor))

    def _part(self, module: nn.Module, given: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return self.split.part(tokens)

    def _whole(self, module: nn.Module, given: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return self.split.whole(tokens)


class SplitAttention:
    """diffusers' processor of an attention among tokens, with the exchange around it where they are split.

    Args:
        tokens: says how they are split.
        processor: what attends where they are not.
    """

    def __init__(self, tokens: SplitTokens, processor: Any) -> None:
        self._tokens, self._processor = tokens, processor

    def __call__(self, attention: Any, x: Tensor, *given: Any, **options: Any) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        split = self._tokens.split
        if split is WHOLE:
            return cast(Tensor, self._processor(attention, x, *given, **options))
        assert not any(value is not None for value in (*given, *options.values()))
        parts = [layer(x) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        qkv = torch.stack(parts, dim=2).unflatten(-1, (attention.heads, -1))  # (B, n, 3, H, K)
        mixed = split.attend(sdpa, qkv).flatten(2)
        return cast(Tensor, attention.to_out[1](attention.to_out[0](mixed)))


def splits(model: Any, x: Tensor) -> WholeTokens:
    """How this forward pass of a model splits the patches of x (B, C, h, w)."""
    return split_of(model, (x.shape[-2] // model.patch_size) * (x.shape[-1] // model.patch_size))
