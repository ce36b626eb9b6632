"""Video diffusion transformer whose blocks attend in turn within a frame and across frames.

Source: Ma et al. 2024, arXiv:2401.03048, variant 1. Parameters carry the names and shapes of Vchitect/Latte
(extras 1: unconditional, extras 2: of classes), so that state dicts interchange both ways.
Dims: `B` batch, `C` channels, `F` frames, `h`, `w` edges of a frame, `N` tokens of a frame, `D` width,
`P` patch edge.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.attention import SelfAttention
from speedit_plugins.trainer.models.dit import PATCH_SIZES, SIZES, DiT
from speedit_plugins.trainer.models.positions import sincos_frames


class SpatialAttention(SelfAttention):
    """Attention among the places of a frame, for each frame by itself: (B, F, N, D) -> (B, F, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view(x.shape)


class TemporalAttention(SelfAttention):
    """Attention among the frames at a place, for each place by itself: (B, F, N, D) -> (B, F, N, D)."""

    def forward(self, x: Tensor) -> Tensor:
        places = x.transpose(1, 2)  # (B, N, F, D)
        return super().forward(places.flatten(0, 1)).view(places.shape).transpose(1, 2)


class Latte(DiT):
    """Predicts the noise (or what the process asks for), and its variance, of a clip of latents.

    A clip may have fewer frames than `num_frames`, which are then the first ones; an image is a clip of one.
    The sides of a frame may differ from `input_size` as a DiT's do.

    Args:
        input_size: as the other arguments that are not named here, of `DiT`.
        num_frames: the most frames of a clip; >= 1.
        depth: number of blocks; even: each second one attends across frames.
        num_classes: 0 for an unconditional model, which has no label embedding.

    Raises:
        ValueError: sizes that do not divide, an attention that is unknown or cannot run.
    """

    attention_types = (SpatialAttention, TemporalAttention)

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice as the original does
        self,
        input_size: int,
        patch_size: int,
        *,
        num_frames: int = 16,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 0,
        learn_sigma: bool = True,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
    ) -> None:
        if depth % 2:
            raise ValueError(f"Latte needs an even depth, got {depth}")
        if num_frames < 1:
            raise ValueError(f"Latte needs num_frames >= 1, got {num_frames}")
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
        self.num_frames, self.num_tokens = num_frames, num_frames * self.num_tokens
        self.temp_embed = nn.Parameter(torch.empty(1, num_frames, hidden_size), requires_grad=False)
        self._reset_frames()

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition = None) -> Tensor:
        """Prediction for a noised clip. Vchitect/Latte has frames before channels, in and out; this has not.

        Args:
            x: (B, C, F, h, w), 1 <= F <= num_frames, h and w multiples of patch_size; those of one batch may
                differ from the next.
            timestep: (B,), original timestep in [0, T), integer or fractional.
            condition: int64 labels (B,) in [0, num_classes], None for an unconditional model; with
                extra_channels named tensors "extra" (B, E, F, h, w) and, of a conditional model, "label".

        Returns:
            (B, 2C, F, h, w): mean channels, then variance channels in [-1, 1] once trained; the C mean
            channels alone without learn_sigma.

        Raises:
            ValueError: a shape differs, or labels are missing or not wanted.
        """
        x, c = self._prepared(x, timestep, condition)
        frames, rows, columns = x.shape[2], x.shape[3] // self.patch_size, x.shape[4] // self.patch_size
        # Frames on top of one another are one tall picture: patches are cut and laid as a picture's.
        x = self.x_embedder(x.flatten(2, 3)).unflatten(1, (frames, rows * columns))  # (B, F, N, D)
        x = x + self._positions(rows, columns, x.device)
        c = c.unsqueeze(1)  # (B, 1, D)
        for index, block in enumerate(self.blocks):
            if index == 1:
                # Where the original has it: what looks at one frame alone need not know which it is.
                x = x + self.temp_embed[:, :frames].unsqueeze(2)
            x = self._through(block, x, c)
        x = self.final_layer(x, c).flatten(1, 2)  # (B, F N, P P out_channels)
        return self._unpatchify(x, frames * rows, columns).unflatten(2, (frames, rows * self.patch_size))

    def reset_parameters(self) -> None:
        """Draws every parameter anew: the law of Vchitect/Latte, in its order of draws, which is DiT's."""
        super().reset_parameters()
        # DiT's constructor comes here before there are frames.
        if hasattr(self, "temp_embed"):
            self._reset_frames()

    @torch.no_grad()
    def _reset_frames(self) -> None:
        self.temp_embed.copy_(sincos_frames(self.temp_embed.shape[2], self.num_frames))

    def _check_shape(self, x: Tensor) -> None:
        edge = self.patch_size
        if (
            x.ndim != 5
            or x.shape[1] != self.in_channels
            or not 1 <= x.shape[2] <= self.num_frames
            or any(n < edge or n % edge for n in x.shape[3:])
        ):
            raise ValueError(
                f"Latte got an input of shape {tuple(x.shape)}, wanted (B, {self.in_channels}, F, h, w) with"
                f" 1 to {self.num_frames} frames F, h and w multiples of patch_size {edge}"
            )


def _variant(size: str, patch_size: int) -> Callable[..., Latte]:
    """The builder of Latte-{size}/{patch_size}."""
    width, num_blocks, heads = SIZES[size]

    def build(  # noqa: PLR0913 - flat, so that a config names each choice as the original does
        input_size: int = 32,
        *,
        num_frames: int = 16,
        in_channels: int = 4,
        num_classes: int = 0,
        class_dropout_prob: float = 0.1,
        learn_sigma: bool = True,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
    ) -> Latte:
        return Latte(
            input_size,
            patch_size,
            num_frames=num_frames,
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


MODELS.register_module(name="Latte", module=Latte)
for _size in SIZES:
    for _patch_size in PATCH_SIZES:
        MODELS.register_module(name=f"Latte-{_size}/{_patch_size}", module=_variant(_size, _patch_size))
