"""Masked diffusion transformers. Source: Gao et al. 2023, arXiv:2303.14389; `MDTv2` is of its second version.

The parameters have the names and shapes of sail-sg/MDT: each code loads the other's state dicts.

Dims: `B` batch, `C` channels, `h`, `w` sides of the input, `N` tokens, `K` kept tokens, `D` width, `P` side
of a patch.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.attention import AttentionKernel
from speedit_plugins.trainer.models.layers.positions import sincos_positions
from speedit_plugins.trainer.models.layers.relative_positions import (
    BiasedBlock,
    RelativePositionBias,
    index_of,
)
from speedit_plugins.trainer.models.sizes import register_sizes, with_defaults


class MDT(DiT):
    """A DiT that can also predict from a part of the tokens, so that training teaches it how they relate.

    The first blocks, the encoder, see the kept tokens alone. Then an additional block, the side-interpolator,
    fills in the masked ones, and the last blocks, the decoder, see all. Without masked tokens the
    side-interpolator is passed by: samples do not use it. Positions are learned, and the attention has a bias
    for each distance, so that the model takes inputs of one size.

    The arguments that are not listed here mean the same as in `DiT`.

    Args:
        depth: number of blocks, without the side-interpolator.
        decode_layer: number of blocks of the decoder, >= 1.
        attention: "sdpa" alone.

    Raises:
        ValueError: sizes do not divide, or no block is left for the encoder.
    """

    is_of_one_size: ClassVar[bool] = True
    """Whether every input has the sides `input_size`."""
    mask_spread: ClassVar[float] = 0.0
    """How much of the tokens a training masks at most beyond its ratio, in the release."""

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice as the original does
        self,
        input_size: int,
        patch_size: int,
        *,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        decode_layer: int = 2,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
    ) -> None:
        name = type(self).__name__
        if attention != "sdpa":
            raise ValueError(
                f"{name} has a bias in its attention; wanted attention 'sdpa', got '{attention}'"
            )
        if not 1 <= decode_layer < depth:
            raise ValueError(
                f"{name} needs decode_layer in [1, depth), so that there are an encoder and a decoder, got"
                f" {decode_layer} of depth {depth}"
            )
        # Plain numbers may be set before the constructor. It adds the blocks.
        self.decode_layer = decode_layer
        # Counted from 1. Not of the blocks that are there: a copy may have lost its last ones.
        self._first_decoder = depth - decode_layer + 1
        super().__init__(
            input_size,
            patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            extra_channels=extra_channels,
        )

    @property
    def split_heads(self) -> int | None:
        """None: its attention has a bias for each distance between two tokens."""
        return None

    @property
    def route_depth(self) -> int | None:
        """None: its masked pass leaves tokens out already, and its decoder adds positions to all."""
        return None

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        condition: Condition = None,
        *,
        hidden_after: int = 0,
        kept: Tensor | None = None,
    ) -> Any:
        """Prediction for a noised input.

        Args:
            x: (B, C, h, w), with h and w equal to input_size.
            timestep: see `DiT.forward`.
            condition: see `DiT.forward`.
            hidden_after: see `DiT.forward`. The side-interpolator is not counted. In the encoder of a masked
                pass the tokens are (B, K, D).
            kept: int64 (B, K), the places of the tokens that the encoder sees, each at most once in a row.
                None keeps all.

        Returns:
            As `DiT.forward`: the prediction (B, 2C, h, w), or (B, C, h, w), of every patch.

        Raises:
            ValueError: a shape is wrong, or labels are missing or not wanted.
        """
        x, c = self._prepared(x, timestep, condition)
        self._check_kept(kept, len(x))
        edge = self.input_size // self.patch_size
        x = self.x_embedder(x) + self.pos_embed  # (B, N, D)
        x, hidden = self._through_parts(x, c, kept, hidden_after)
        x = self.final_layer(x, c)  # (B, N, P P out_channels)
        x = self._unpatchify(x, edge, edge)  # (B, out_channels, h, w)
        return x if hidden is None else (x, hidden)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew, from the distributions of sail-sg/MDT.

        Those of `DiT` come first, in its order. Positions start as DiT's and are learned.
        """
        super().reset_parameters()
        for block in self.sideblocks:
            nn.init.zeros_(cast(Any, block).adaLN_modulation[1].weight)
        edge = self.input_size // self.patch_size
        self.decoder_pos_embed.copy_(sincos_positions(self.pos_embed.shape[2], edge))
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, RelativePositionBias):
                module.reset_parameters()

    def _add_blocks(self, depth: int, num_heads: int, *, mlp_ratio: float, kernel: AttentionKernel) -> None:
        self._add_positions()
        self.blocks = self._blocks(depth, num_heads, mlp_ratio)
        self.sideblocks = self._blocks(1, num_heads, mlp_ratio)

    def _add_positions(self) -> None:
        """The parameters of the model that belong to no layer."""
        self.pos_embed.requires_grad_(True)
        self.decoder_pos_embed = nn.Parameter(torch.empty_like(self.pos_embed))
        self.mask_token = nn.Parameter(torch.empty_like(self.pos_embed[:, :1]))

    def _blocks(
        self, count: int, num_heads: int, mlp_ratio: float, *, has_skip: bool = False
    ) -> nn.ModuleList:
        width, edge = self.pos_embed.shape[2], self.input_size // self.patch_size
        return nn.ModuleList(
            BiasedBlock(width, num_heads, mlp_ratio=mlp_ratio, edge=edge, has_skip=has_skip)
            for _ in range(count)
        )

    def _through_parts(
        self, x: Tensor, c: Tensor, kept: Tensor | None, hidden_after: int
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, N, D) after all blocks, and after block `hidden_after`."""
        blocks = [cast(BiasedBlock, block) for block in self.blocks]
        # The same in every block.
        index = cast(Tensor, blocks[0].attn.rel_pos_bias.relative_position_index)  # (N, N)
        start, hidden = x, None
        seen, skips = index, list[Tensor]()
        if kept is not None:
            x, seen = _rows(x, kept), index_of(kept, index)
        for number, block in enumerate(blocks, start=1):
            if number == self._first_decoder:
                x, seen = self._decoder_input(x, c, kept, index), index
            skip = None
            if block.skip_linear is not None:
                skip = start if number >= self._first_decoder else skips.pop()
            x = self._run(block, x, c, seen, skip)
            if number <= self._num_in:
                skips.append(x)
            if number == hidden_after:
                hidden = x
        return x, hidden

    @property
    def _num_in(self) -> int:
        """Number of first blocks whose outputs skip to later ones."""
        return 0

    def _decoder_input(self, x: Tensor, c: Tensor, kept: Tensor | None, index: Tensor) -> Tensor:
        """All tokens (B, N, D) with the decoder's positions; masked ones come from the side-interpolator."""
        if kept is None:
            return x + self.decoder_pos_embed
        places = kept.unsqueeze(2).expand(-1, -1, x.shape[2])  # (B, K, D)
        whole = self.mask_token.to(x.dtype).expand(len(x), self.num_tokens, -1)
        whole = whole.scatter(1, places, x) + self.decoder_pos_embed  # (B, N, D)
        filled = whole
        for block in self.sideblocks:
            filled = self._run(block, filled, c, index, None)
        is_kept = torch.zeros_like(whole[..., 0], dtype=torch.bool).scatter(1, kept, value=True)
        return torch.where(is_kept.unsqueeze(2), whole, filled)

    def _run(self, block: nn.Module, x: Tensor, c: Tensor, index: Tensor, skip: Tensor | None) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # A block makes no random draws, so there is no generator state to keep.
            return cast(
                Tensor, checkpoint(block, x, c, index, skip, use_reentrant=False, preserve_rng_state=False)
            )
        return cast(Tensor, block(x, c, index, skip))

    def _check_shape(self, x: Tensor) -> None:
        edge, name = self.input_size, type(self).__name__
        if x.shape[1:] != (self.in_channels, edge, edge):
            raise ValueError(
                f"{name} got an input of shape {tuple(x.shape)}, wanted (B, {self.in_channels}, {edge},"
                f" {edge}): its positions are learned for one grid"
            )

    def _check_kept(self, kept: Tensor | None, batch: int) -> None:
        if kept is None:
            return
        if kept.ndim != 2 or len(kept) != batch or not 1 <= kept.shape[1] <= self.num_tokens:
            raise ValueError(
                f"{type(self).__name__} got kept tokens of shape {tuple(kept.shape)}, wanted ({batch}, K)"
                f" with K in [1, {self.num_tokens}]"
            )


class MDTv2(MDT):
    """An MDT with long skip connections, as of a U-Net, in the encoder, and from the input to the decoder.

    The arguments mean the same as in `MDT`.

    Raises:
        ValueError: sizes do not divide, or the encoder has no even number of blocks.
    """

    mask_spread = 0.2

    def __init__(
        self, input_size: int, patch_size: int, *, depth: int, decode_layer: int = 4, **options: Any
    ) -> None:
        if (depth - decode_layer) % 2:
            raise ValueError(
                f"MDTv2 needs an even number of blocks in its encoder, depth - decode_layer, got {depth} -"
                f" {decode_layer}"
            )
        super().__init__(input_size, patch_size, depth=depth, decode_layer=decode_layer, **options)

    def _add_blocks(self, depth: int, num_heads: int, *, mlp_ratio: float, kernel: AttentionKernel) -> None:
        half = (depth - self.decode_layer) // 2
        self._add_positions()
        self.en_inblocks = self._blocks(half, num_heads, mlp_ratio)
        self.en_outblocks = self._blocks(half, num_heads, mlp_ratio, has_skip=True)
        self.de_blocks = self._blocks(self.decode_layer, num_heads, mlp_ratio, has_skip=True)
        self.sideblocks = self._blocks(1, num_heads, mlp_ratio)

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]  # a DiT has them in one list of layers
        """All blocks in their order, without the side-interpolator."""
        return [*self.en_inblocks, *self.en_outblocks, *self.de_blocks]

    @property
    def _num_in(self) -> int:
        return len(self.en_inblocks)


def _rows(x: Tensor, kept: Tensor) -> Tensor:
    """The kept tokens, (B, N, D) and (B, K) -> (B, K, D)."""
    return x.gather(1, kept.unsqueeze(2).expand(-1, -1, x.shape[2]))


with_defaults(MDTv2, MDT)
MODELS.register_module(name="MDT", module=MDT)
MODELS.register_module(name="MDTv2", module=MDTv2)
register_sizes("MDT", MDT)
# The release has no other patches.
register_sizes("MDTv2", MDTv2, patch_sizes=(2,))
