"""Diffusion transformer with adaLN-Zero conditioning. Source: Peebles and Xie 2022, arXiv:2212.09748.

The parameters have the names and shapes of facebookresearch/DiT: each code loads the other's state dicts.

Dims: `B` batch, `C` channels, `h`, `w` sides of the input, `N` tokens, `D` width, `P` side of a patch.
"""

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.interface import level_of, split_extra
from speedit_plugins.trainer.models.layers.attention import AttentionKernel, SelfAttention, attention_kernel
from speedit_plugins.trainer.models.layers.blocks import Block, BlockOptions, FinalLayer, PatchEmbedder
from speedit_plugins.trainer.models.layers.conditioning import LabelEmbedder, TimestepEmbedder
from speedit_plugins.trainer.models.layers.positions import sincos_positions
from speedit_plugins.trainer.models.layers.rotary import GridRotary, Rotation
from speedit_plugins.trainer.models.layers.sequence import WHOLE, SequenceGroup, WholeTokens, split_of
from speedit_plugins.trainer.models.routing import Passage, Route
from speedit_plugins.trainer.models.sizes import register_sizes


class DiT(nn.Module):
    """Predicts the noise (or another target of the process) and its variance, for a latent or an image.

    The model takes inputs of every size that is a multiple of the patch size. The positions of another grid
    than the square one of `input_size` are scaled, on each axis, to the range of the square grid.
    Source: PixArt-alpha, Chen et al. 2023, arXiv:2310.00426.

    Args:
        input_size: side of the square input that the position table is made for; a multiple of patch_size.
        patch_size: P.
        in_channels: C.
        hidden_size: D, a multiple of num_heads and, for the sine-cosine positions, of 4.
        depth: number of blocks.
        num_heads: heads of each attention.
        mlp_ratio: width of a block's perceptron divided by D.
        class_dropout_prob: probability in [0, 1) that training replaces a label by `null_label`.
        num_classes: number of classes; 0 makes an unconditional model without label embedding.
        learn_sigma: predict C variance channels after the C mean channels.
        attention: "sdpa" or "xformers"; the constructor checks that "xformers" runs on this machine.
        gradient_checkpointing: in training, recompute each block's activations in the backward pass.
        extra_channels: E, the channels of a mask and a masked latent, for example, concatenated to x.
        norm: see `BlockOptions`, as the three below.
        qk_norm: norm queries and keys.
        rope: rotary positions; needs heads with a width that is a multiple of 4.
        perceptron: of the blocks.

    Raises:
        ValueError: sizes do not divide, the attention is unknown or cannot run, or a name is unknown.
    """

    route: Route | None = None
    """The blocks that a part of the tokens passes by in training; None is none."""
    sequence: SequenceGroup | None = None
    """The ranks that share samples in training; None is this rank alone."""
    earliest_route: ClassVar[int] = 0
    """Number of the first block, counted from 0, that tokens may pass by."""
    predicts: ClassVar[str | None] = None
    """The one `diffusion.prediction_type` that the model is made for; None takes any."""
    attention_types: ClassVar[tuple[type[SelfAttention], ...]] = (SelfAttention,)
    """Classes of attention that the blocks use in turn."""
    axes: ClassVar[int] = 2
    """Axes of the grid of patches."""
    embedder_type: ClassVar[type[PatchEmbedder]] = PatchEmbedder
    """Makes tokens of the patches of an input."""
    lora_targets: ClassVar[tuple[str, ...]] = ("attn.qkv", "attn.proj")
    """Ends of the names of the layers that get LoRA's adapters if the config names none."""

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
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
        norm: str = "layer",
        qk_norm: bool = False,
        rope: bool = False,
        perceptron: str = "gelu",
    ) -> None:
        super().__init__()
        _check_sizes(
            input_size,
            patch_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            axes=self.axes,
        )
        if num_classes < 0:
            raise ValueError(f"the model needs num_classes >= 0 (0: unconditional), got {num_classes}")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.num_tokens = num_classes, (input_size // patch_size) ** self.axes
        self.learn_sigma = learn_sigma
        self.gradient_checkpointing = gradient_checkpointing
        self.extra_channels = extra_channels
        self.options = BlockOptions(norm=norm, qk_norm=qk_norm, rope=rope, perceptron=perceptron)
        kernel = attention_kernel(attention, head_size=hidden_size // num_heads)

        self.x_embedder = self.embedder_type(patch_size, in_channels + extra_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = (
            LabelEmbedder(num_classes, hidden_size, dropout_prob=class_dropout_prob) if num_classes else None
        )
        # Of the noise in the extra channels; see `tell_level`.
        self.level_embedder: TimestepEmbedder | None = None
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens, hidden_size), requires_grad=False)
        # Positions of other grids by rows, columns and device. Not buffers: the state dict stays DiT's.
        self._other_positions: dict[tuple[int, int, torch.device], Tensor] = {}
        self.feat_rope = GridRotary(input_size // patch_size, hidden_size // num_heads) if rope else None
        self._add_blocks(depth, num_heads, mlp_ratio=mlp_ratio, kernel=kernel)
        # The layer makes P P values of each channel; with a third axis there are P times as many.
        layers = self.out_channels * patch_size ** (self.axes - 2)
        self.final_layer = FinalLayer(hidden_size, patch_size, layers, options=self.options)
        self.reset_parameters()

    @property
    def route_depth(self) -> int | None:
        """Number of blocks that a route counts; None if tokens cannot pass blocks by."""
        return len(self.blocks)

    @property
    def split_heads(self) -> int | None:
        """Heads that the ranks of a `sequence` divide; None if the tokens cannot be split."""
        return cast(Block, self.blocks[0]).attn.num_heads

    def set_route(self, route: Route | None) -> None:
        """Lets a part of the tokens pass blocks by in training, see `routing`."""
        self.route = route

    @property
    def is_told_level(self) -> bool:
        """Whether the condition has "level", the level of the noise in the extra channels."""
        return self.level_embedder is not None

    def tell_level(self) -> None:
        """Adds an embedding of "level" in the condition, (B,) in [0, 1], to that of the timestep."""
        self.level_embedder = TimestepEmbedder(self.pos_embed.shape[2])
        self._reset_level()

    @property
    def null_label(self) -> int | None:
        """The label for "no class", equal to num_classes; None if the model has no such label."""
        return None if self.y_embedder is None else self.y_embedder.null_label

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Condition = None, *, hidden_after: int = 0
    ) -> Any:
        """Prediction for a noised input.

        Args:
            x: (B, C, h, w), with h and w multiples of patch_size. They may change from call to call.
            timestep: (B,), timestep in [0, T) of the process without respacing, integer or fractional.
            condition: int64 labels (B,) in [0, num_classes], or None for an unconditional model. With
                extra_channels it is a mapping of "extra" (B, E, h, w), "label" if there are classes, and
                "level" after `tell_level`.
            hidden_after: number of a block, counted from 1, whose output is wanted too; 0 wants none.

        Returns:
            (B, 2C, h, w): the mean channels, then the variance channels, in [-1, 1] after training.
            Without learn_sigma only the mean channels, (B, C, h, w). With `hidden_after` a pair of it and the
            tokens after that block, (B, N, D).

        Raises:
            ValueError: a shape is wrong, or labels are missing or not wanted.
        """
        x, c = self._prepared(x, timestep, condition)
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        split = split_of(self, rows * columns)
        x = split.part(self.x_embedder(x) + self._positions(rows, columns, x.device))  # (B, N, D)
        rotation = split.rotation(None if self.feat_rope is None else self.feat_rope(rows, columns))
        x, hidden = self._through_blocks(x, c, hidden_after=hidden_after, rotations=(rotation,), split=split)
        x = split.whole(self.final_layer(x, c))  # (B, N, P P out_channels)
        x = self._unpatchify(x, rows, columns)  # (B, out_channels, h, w)
        return x if hidden is None else (x, hidden)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the module as `nn.Module.compile` does, but leaves out the cache of positions.

        If the cache were compiled too, every new grid in it would trigger a recompilation for all others.
        """
        self._cached_positions = torch.compiler.disable(self._cached_positions)  # type: ignore[method-assign]  # of this object
        if self.feat_rope is not None:
            self.feat_rope.cached = torch.compiler.disable(self.feat_rope.cached)  # type: ignore[method-assign]  # as above
        super().compile(*args, **options)

    def _add_blocks(self, depth: int, num_heads: int, *, mlp_ratio: float, kernel: AttentionKernel) -> None:
        """Gives the model its blocks. Whatever is added here precedes the last layer in the state dict."""
        hidden_size = self.pos_embed.shape[2]
        self.blocks = nn.ModuleList(
            Block(
                hidden_size,
                num_heads,
                mlp_ratio=mlp_ratio,
                kernel=kernel,
                attention=self._attention_of(index),
                options=self.options,
            )
            for index in range(depth)
        )

    def _attention_of(self, index: int) -> Callable[..., SelfAttention]:
        """What builds the attention of a block, counted from 0."""
        return self.attention_types[index % len(self.attention_types)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew, from the distributions of facebookresearch/DiT and in its order.

        Linear layers and the patch embedding are Xavier-uniform with zero bias. Label embeddings and the
        timestep's layers are N(0, 0.02^2). Every modulation and the last layer are zero, so that each block
        starts as the identity (adaLN-Zero).
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.LayerNorm | nn.RMSNorm | GridRotary):
                layer.reset_parameters()
        self.pos_embed.copy_(self._position_table())
        self.x_embedder.reset_parameters()
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[index]).weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(cast(Any, part).adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)
        self._reset_level()

    def _reset_level(self) -> None:
        if self.level_embedder is None:
            return
        for index in (0, 2):
            layer = cast(nn.Linear, self.level_embedder.mlp[index])
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def _embedded(self, timestep: Tensor, condition: Condition) -> Tensor:
        """The embedding (B, D) of the timestep, and of the level of noise if the model is told it."""
        c = cast(Tensor, self.t_embedder(self._embedded_time(timestep)))
        level = level_of(condition, is_told=self.is_told_level)
        return c if level is None or self.level_embedder is None else c + self.level_embedder(level)

    def _prepared(self, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """x with the extra channels (B, C + E, ...), and the embedding c (B, D) that modulates the blocks."""
        extra, label = split_extra(condition, self.extra_channels)
        self._check_shape(x)
        self._check_condition(x, timestep, label)
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype)], dim=1)
        c = self._embedded(timestep, condition)
        return x, c if self.y_embedder is None else c + self.y_embedder(label)

    def _through_blocks(
        self,
        x: Tensor,
        c: Tensor,
        *,
        hidden_after: int,
        rotations: tuple[Rotation | None, ...] = (None,),
        split: WholeTokens = WHOLE,
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens after all blocks, which take `rotations` in turn, and after block `hidden_after`."""
        assert self.feat_rope is None or rotations[0] is not None
        hidden, passage = None, Passage(self.route if self.training else None)
        for number, block in enumerate(self.blocks, start=1):
            x = passage.before(number, self._before(number, x))
            x = self._through(block, x, c, self._rotation(number, rotations, passage), split)
            x = passage.after(number, x)
            if number == hidden_after:
                hidden = split.whole(passage.whole(x))
        return x, hidden

    def _rotation(
        self, number: int, rotations: tuple[Rotation | None, ...], passage: Passage
    ) -> Rotation | None:
        """What turns the tokens that block `number`, counted from 1, sees."""
        return passage.of_tokens(rotations[(number - 1) % len(rotations)])

    def _before(self, number: int, x: Tensor) -> Tensor:
        """What block `number`, counted from 1, is given."""
        return x

    def _through(self, block: nn.Module, x: Tensor, c: Tensor, *given: Any) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # A block makes no random draws, so there is no generator state to keep.
            found = checkpoint(block, x, c, *given, use_reentrant=False, preserve_rng_state=False)
            return cast(Tensor, found)
        return cast(Tensor, block(x, c, *given))

    def _embedded_time(self, timestep: Tensor) -> Tensor:
        """What the timestep's embedding is computed of, (B,)."""
        return timestep

    def _check_shape(self, x: Tensor) -> None:
        edge = self.patch_size
        if x.ndim != 4 or x.shape[1] != self.in_channels or any(n < edge or n % edge for n in x.shape[2:]):
            raise ValueError(
                f"DiT got an input of shape {tuple(x.shape)}, wanted (B, {self.in_channels}, h, w) with"
                f" h and w multiples of patch_size {edge}"
            )

    def _check_condition(self, x: Tensor, timestep: Tensor, condition: Condition) -> None:
        if timestep.shape != x.shape[:1]:
            raise ValueError(
                f"the model got timesteps of shape {tuple(timestep.shape)}, wanted ({x.shape[0]},)"
            )
        if self.y_embedder is None:
            if condition is not None:
                raise ValueError(
                    "the model got labels, but num_classes=0 makes it unconditional; wanted condition=None"
                )
            return
        if condition is None:
            raise ValueError(
                f"the model got no labels; wanted ({x.shape[0]},) int64 labels in [0, {self.num_classes}]"
            )
        if not isinstance(condition, Tensor):
            raise ValueError(
                f"the model got named tensors {sorted(condition)}, wanted int64 labels ({x.shape[0]},)"
            )
        if condition.shape != x.shape[:1] or condition.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"the model got labels of shape {tuple(condition.shape)} and type {condition.dtype}, "
                f"wanted ({x.shape[0]},) int64 in [0, {self.num_classes}]"
            )

    def _position_table(self) -> Tensor:
        """The position table of the grid of `input_size`, float32 (1, N, D)."""
        return sincos_positions(self.pos_embed.shape[2], self.input_size // self.patch_size)

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The position table of a grid (1, rows columns, D), in the dtype of `pos_embed`."""
        edge = self.input_size // self.patch_size
        if rows == columns == edge:
            return self.pos_embed
        return self._cached_positions(rows, columns, device).to(self.pos_embed.dtype)

    def _cached_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The position table of a grid other than the model's square, float32 (1, rows columns, D)."""
        key = (rows, columns, device)
        if key not in self._other_positions:
            edge = self.input_size // self.patch_size
            table = sincos_positions(self.pos_embed.shape[2], edge, shape=(rows, columns))
            self._other_positions[key] = table.to(device)
        return self._other_positions[key]

    def _unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(B, N, P P out_channels) -> (B, out_channels, h, w)."""
        edge = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=edge, q=edge)


def _check_sizes(
    input_size: int, patch_size: int, *, hidden_size: int, depth: int, num_heads: int, axes: int
) -> None:
    """Raises ValueError for sizes that are not positive or do not divide."""
    sizes = {
        "input_size": input_size,
        "patch_size": patch_size,
        "hidden_size": hidden_size,
        "depth": depth,
        "num_heads": num_heads,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"the model needs {name} >= 1, got {size}")
    if input_size % patch_size:
        raise ValueError(
            f"the model needs an input_size that is a multiple of patch_size {patch_size}, got {input_size}"
        )
    # Each axis has sines and cosines.
    if hidden_size % num_heads or hidden_size % (2 * axes):
        raise ValueError(
            f"the model needs a hidden_size that is a multiple of {2 * axes} and of num_heads {num_heads},"
            f" got {hidden_size}"
        )


MODELS.register_module(name="DiT", module=DiT)
register_sizes("DiT", DiT)
