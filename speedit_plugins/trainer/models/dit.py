"""Diffusion transformer with adaLN-Zero conditioning. Source: Peebles and Xie 2022, arXiv:2212.09748.

Parameters carry the names and shapes of facebookresearch/DiT, so that state dicts interchange both ways.
Dims: `B` batch, `C` channels, `h`, `w` edges of the input, `N` tokens, `D` width, `P` patch edge.
"""

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.attention import AttentionKernel, SelfAttention, attention_kernel
from speedit_plugins.trainer.models.conditioning import LabelEmbedder, TimestepEmbedder
from speedit_plugins.trainer.models.interface import split_extra
from speedit_plugins.trainer.models.linear import Linear
from speedit_plugins.trainer.models.positions import sincos_positions

# Width, depth and heads. Source: table 1 of the paper.
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PATCH_SIZES = (2, 4, 8)


class DiT(nn.Module):
    """Predicts the noise (or what the process asks for), and its variance, of a latent or image.

    Its parameters fit inputs of every size that is whole patches. On another grid than the square one of
    `input_size` positions are stretched or shrunk, per axis, to the range that they have on it.
    Source: PixArt-alpha, Chen et al. 2023, arXiv:2310.00426.

    Args:
        input_size: edge of the square input that positions are laid out for; a multiple of patch_size.
        patch_size: P.
        in_channels: C.
        hidden_size: D; a multiple of 4 (sine-cosine positions) and of num_heads.
        depth: number of blocks.
        num_heads: heads of each attention.
        mlp_ratio: width of a block's perceptron over D.
        class_dropout_prob: probability in [0, 1) that training replaces a label by `null_label`.
        num_classes: 0 for an unconditional model, which has no label embedding.
        learn_sigma: predict C variance channels after the C mean channels.
        attention: "sdpa" or "xformers"; the latter is tried here, and refused where it cannot run.
        gradient_checkpointing: in training, recompute each block in the backward pass instead of keeping it.
        extra_channels: E of an input that is concatenated to x, such as a mask and a masked latent.

    Raises:
        ValueError: sizes that do not divide, an attention that is unknown or cannot run.
    """

    attention_types: ClassVar[tuple[type[SelfAttention], ...]] = (SelfAttention,)
    """What the blocks attend with, in turn."""

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
    ) -> None:
        super().__init__()
        _check_sizes(input_size, patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads)
        if num_classes < 0:
            raise ValueError(f"the model needs num_classes >= 0 (0: unconditional), got {num_classes}")
        self.input_size, self.patch_size = input_size, patch_size
        self.in_channels, self.out_channels = in_channels, in_channels * (2 if learn_sigma else 1)
        self.num_classes, self.num_tokens = num_classes, (input_size // patch_size) ** 2
        self.learn_sigma = learn_sigma
        self.gradient_checkpointing = gradient_checkpointing
        self.extra_channels = extra_channels
        kernel = attention_kernel(attention, head_size=hidden_size // num_heads)

        self.x_embedder = PatchEmbedder(patch_size, in_channels + extra_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = (
            LabelEmbedder(num_classes, hidden_size, dropout_prob=class_dropout_prob) if num_classes else None
        )
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens, hidden_size), requires_grad=False)
        # Positions on other grids, by rows, columns and device: no buffers, the state dict is the original's.
        self._other_positions: dict[tuple[int, int, torch.device], Tensor] = {}
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio=mlp_ratio, kernel=kernel, attention=attention_type)
            for attention_type in islice(cycle(self.attention_types), depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.reset_parameters()

    @property
    def null_label(self) -> int | None:
        """The label of "no class", num_classes; None where the model has learned none."""
        return None if self.y_embedder is None else self.y_embedder.null_label

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition = None) -> Tensor:
        """Prediction for a noised input.

        Args:
            x: (B, C, h, w), h and w multiples of patch_size; those of one batch may differ from the next.
            timestep: (B,), original timestep in [0, T), integer or fractional.
            condition: int64 labels (B,) in [0, num_classes], None for an unconditional model; with
                extra_channels named tensors "extra" (B, E, h, w) and, of a conditional model, "label".

        Returns:
            (B, 2C, h, w): mean channels, then variance channels in [-1, 1] once trained; the C mean channels
            alone without learn_sigma.

        Raises:
            ValueError: a shape differs, or labels are missing or not wanted.
        """
        x, c = self._prepared(x, timestep, condition)
        rows, columns = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        x = self.x_embedder(x) + self._positions(rows, columns, x.device)  # (B, N, D)
        for block in self.blocks:
            x = self._through(block, x, c)
        x = self.final_layer(x, c)  # (B, N, P P out_channels)
        return self._unpatchify(x, rows, columns)  # (B, out_channels, h, w)

    def compile(self, *args: Any, **options: Any) -> None:
        """As every module's, but for the positions of other grids.

        Compiled along, each new grid in their cache would invalidate what is compiled for all others.
        """
        self._cached_positions = torch.compiler.disable(self._cached_positions)  # type: ignore[method-assign]  # of this object
        super().compile(*args, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew: the law of facebookresearch/DiT, in its order of draws.

        Xavier-uniform linear layers and patches with zero bias, N(0, 0.02^2) labels and timestep layers,
        zeros where adaLN-Zero starts as the identity: every modulation and the last layer.
        """
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.pos_embed.copy_(sincos_positions(self.pos_embed.shape[2], self.input_size // self.patch_size))
        self.x_embedder.reset_parameters()
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for index in (0, 2):
            nn.init.normal_(cast(nn.Linear, self.t_embedder.mlp[index]).weight, std=0.02)
        for part in (*self.blocks, self.final_layer):
            nn.init.zeros_(cast(Any, part).adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def _prepared(self, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """x with the extra channels, (B, C + E, ...), and what modulates the blocks, (B, D)."""
        extra, label = split_extra(condition, self.extra_channels)
        self._check_shape(x)
        self._check_condition(x, timestep, label)
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype)], dim=1)
        c = self.t_embedder(timestep)
        return x, c if self.y_embedder is None else c + self.y_embedder(label)

    def _through(self, block: nn.Module, x: Tensor, c: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            # A block draws nothing at random: there is no generator state to keep.
            return cast(Tensor, checkpoint(block, x, c, use_reentrant=False, preserve_rng_state=False))
        return cast(Tensor, block(x, c))

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

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The position table of a grid (1, rows columns, D), in the type of the parameter."""
        edge = self.input_size // self.patch_size
        if rows == columns == edge:
            return self.pos_embed
        return self._cached_positions(rows, columns, device).to(self.pos_embed.dtype)

    def _cached_positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The position table of another grid than the model's own, float32 (1, rows columns, D)."""
        key = (rows, columns, device)
        if key not in self._other_positions:
            edge = self.input_size // self.patch_size
            table = sincos_positions(self.pos_embed.shape[2], edge, shape=(rows, columns))
            self._other_positions[key] = table.to(device)
        return self._other_positions[key]

    def _unpatchify(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(B, N, P P out_channels) -> (B, out_channels, h, w)."""
        edge = self.patch_size
        x = x.view(x.shape[0], rows, columns, edge, edge, self.out_channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(x.shape[0], self.out_channels, rows * edge, columns * edge)


class Block(nn.Module):
    """Attention, then a perceptron, each modulated and gated by c: x (B, N, D), c (B, D) -> (B, N, D).

    With an `attention` that takes (B, F, N, D), so does the block, and c is (B, 1, D).
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

    Of a clip x (B, F, N, D), c (B, 1, D) -> (B, F, N, P P out_channels).
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
    """Two linear layers `fc1`, `fc2` around a GELU in its tanh form: (B, N, D) -> (B, N, D)."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(x), approximate="tanh")))


class PatchEmbedder(nn.Module):
    """Linear map of each P x P patch, tokens in row-major order: (B, C, H, W) -> (B, N, D).

    The weight is kept as that of the equal convolution, `proj.weight` (D, C, P, P).
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def reset_parameters(self) -> None:
        """Xavier-uniform as a linear layer of C P P inputs, zero bias."""
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.weight.shape[0], -1))
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def forward(self, x: Tensor) -> Tensor:
        patches = patches_of(x, self.proj.kernel_size[0])  # (B, N, C P P)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


def patches_of(x: Tensor, edge: int) -> Tensor:
    """Values of each patch, (B, C, H, W) -> (B, N, C P P), contiguous, for edges that are multiples of P.

    A convolution's tokens come channel first, and every later elementwise operation of the residual stream
    would inherit those strides; `F.unfold` launches a kernel per row on a CUDA device.
    """
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // edge, edge, width // edge, edge).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, -1, channels * edge * edge)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift, with x (B, N, D), shift and scale (B, 1, D)."""
    return torch.addcmul(shift, x, scale + 1)


def _check_sizes(input_size: int, patch_size: int, *, hidden_size: int, depth: int, num_heads: int) -> None:
    """Raises ValueError for sizes that do not divide or are not positive."""
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
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(
            f"the model needs a hidden_size that is a multiple of 4 and of num_heads {num_heads},"
            f" got {hidden_size}"
        )


def _variant(size: str, patch_size: int) -> Callable[..., DiT]:
    """The builder of DiT-{size}/{patch_size}."""
    width, num_blocks, heads = SIZES[size]

    def build(
        input_size: int = 32,
        *,
        in_channels: int = 4,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
    ) -> DiT:
        return DiT(
            input_size,
            patch_size,
            in_channels=in_channels,
            hidden_size=width,
            depth=num_blocks,
            num_heads=heads,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            extra_channels=extra_channels,
        )

    return build


MODELS.register_module(name="DiT", module=DiT)
for _size in SIZES:
    for _patch_size in PATCH_SIZES:
        MODELS.register_module(name=f"DiT-{_size}/{_patch_size}", module=_variant(_size, _patch_size))
