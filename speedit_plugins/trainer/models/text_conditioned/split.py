"""Networks of diffusers whose tokens are split over ranks, see `models/layers/sequence.py`.

The tokens are split behind the layer that embeds the patches, and gathered behind the last one. Attention to
a caption needs no exchange: every rank has the caption.

Dims: `B` batch, `n` tokens of this rank, `D` width.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.models.layers.attention import sdpa
from speedit_plugins.trainer.models.layers.sequence import WHOLE, TokenSplit, WholeTokens

# Position of the timestep's modulation among the arguments of a block.
_TIMESTEP = 4


class SplitTokens:
    """How a network splits its tokens: not at all, until a forward pass begins with a split.

    A backward pass that recomputes blocks comes before the next forward pass, and finds the same split.

    Args:
        net: its `pos_embed` makes tokens, and its `proj_out` is the last layer. The attentions `attn1` of its
            blocks are among the tokens. Its blocks across frames need no exchange: ranks split the places.
    """

    def __init__(self, net: nn.Module) -> None:
        self.split: WholeTokens = WHOLE
        cast(nn.Module, net.pos_embed).register_forward_hook(self._part)
        cast(nn.Module, net.proj_out).register_forward_hook(self._whole)
        for block in cast(nn.ModuleList, net.transformer_blocks):
            attention = cast(Any, block).attn1
            attention.set_processor(SplitAttention(self, attention.processor))
        for block in cast(nn.ModuleList, getattr(net, "temporal_transformer_blocks", nn.ModuleList())):
            block.register_forward_pre_hook(self._across_frames)

    def _part(self, module: nn.Module, given: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return self.split.part(tokens)

    def _whole(self, module: nn.Module, given: tuple[Any, ...], tokens: Tensor) -> Tensor:
        return self.split.whole(tokens)

    def _across_frames(self, block: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        if not isinstance(self.split, TokenSplit):
            return given
        # diffusers repeats the timestep for every place of all tokens, so any n of a sample are alike.
        x, timestep = given[0], given[_TIMESTEP]
        samples = len(timestep) // sum(self.split.counts)
        own = timestep.unflatten(0, (samples, -1))[:, : len(x) // samples].flatten(0, 1)
        return (*given[:_TIMESTEP], own, *given[_TIMESTEP + 1 :])


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
