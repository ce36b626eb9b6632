"""Latte, a video diffusion transformer. Its blocks attend in turn within frames and across frames.

Source: Ma et al. 2024, arXiv:2401.03048, variant 1. The parameters have the names and shapes of
Vchitect/Latte, unconditional (`extras` 1) or with classes (`extras` 2): each code loads the other's state
dicts.

Dims: `B` batch, `C` channels, `F` frames, `h`, `w` sides of a frame, `N` tokens of a frame, `D` width, `P`
side of a patch.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.attention import SelfAttention
from speedit_plugins.trainer.models.layers.positions import sincos_frames
from speedit_plugins.trainer.models.layers.rotary import FrameRotary, Rotation
from speedit_plugins.trainer.models.layers.sequence import WHOLE, WholeTokens, split_of
from speedit_plugins.trainer.models.routing import Passage
from speedit_plugins.trainer.models.sizes import register_sizes, with_defaults


class SpatialAttention(SelfAttention):
    """Attention within each frame, among its N tokens: (B, F, N, D) -> (B, F, N, D)."""

    def forward(self, x: Tensor, rotation: Rotation | None = None, split: WholeTokens = WHOLE) -> Tensor:
        if rotation is not None and rotation.cos.ndim == 3:
            # Each sample has places of its own, the same in all its frames.
            rotation = Rotation(*(part.repeat_interleave(x.shape[1], dim=0) for part in rotation))
        mixed = super().forward(rearrange(x, "b f n d -> (b f) n d"), rotation, split)
        return rearrange(mixed, "(b f) n d -> b f n d", b=x.shape[0])


class TemporalAttention(SelfAttention):
    """Attention at each place of the frame, among the F frames: (B, F, N, D) -> (B, F, N, D)."""

    # Ranks split the places: all frames of a place are on one.
    is_shared = False

    def forward(self, x: Tensor, rotation: Rotation | None = None, split: WholeTokens = WHOLE) -> Tensor:
        mixed = super().forward(rearrange(x, "b f n d -> (b n) f d"), rotation)
        return rearrange(mixed, "(b n) f d -> b f n d", b=x.shape[0])


class Latte(DiT):
    """Predicts the noise (or another target of the process) and its variance, for a clip of latents.

    A clip may have fewer frames than `num_frames`; it gets the positions of the first ones. An image is a
    clip of one frame. As with a DiT, the sides of a frame may differ from `input_size`.

    The arguments that are not listed here mean the same as in `DiT`.

    Args:
        num_frames: the largest number of frames of a clip; >= 1.
        depth: number of blocks, even; every second block attends across frames.
        num_classes: number of classes; 0 makes an unconditional model without label embedding.
        rope: rotary positions, of the patches within frames and of the frames across frames.

    Raises:
        ValueError: sizes do not divide, or the attention is unknown or cannot run.
    """

    attention_types = (SpatialAttention, TemporalAttention)
    # The second block is given the positions of the frames. Every token needs them.
    earliest_route = 1

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        *,
        num_frames: int = 16,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int = 0,
        **options: Any,
    ) -> None:
        if depth % 2:
            raise ValueError(f"Latte needs an even depth, got {depth}")
        if num_frames < 1:
            raise ValueError(f"Latte needs num_frames >= 1, got {num_frames}")
        options |= {"depth": depth, "num_classes": num_classes}
        super().__init__(input_size, patch_size, hidden_size=hidden_size, num_heads=num_heads, **options)
        self.num_frames, self.num_tokens = num_frames, num_frames * self.num_tokens
        self.temp_embed = nn.Parameter(torch.empty(1, num_frames, hidden_size), requires_grad=False)
        self.temp_rope = None if self.feat_rope is None else FrameRotary(num_frames, hidden_size // num_heads)
        self._reset_frames()

    @property
    def taken_frames(self) -> range:
        """Numbers of frames that a clip may have."""
        return range(1, self.num_frames + 1)

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Condition = None, *, hidden_after: int = 0
    ) -> Any:
        """Prediction for a noised clip. Channels come before frames here; in Vchitect/Latte they come after.

        Args:
            x: (B, C, F, h, w), with 1 <= F <= num_frames and h and w multiples of patch_size. F, h and w may
                change from call to call.
            timestep: (B,), timestep in [0, T) of the process without respacing, integer or fractional.
            condition: int64 labels (B,) in [0, num_classes], or None for an unconditional model. With
                extra_channels it is a mapping of "extra" (B, E, F, h, w) and, if there are classes, "label".
            hidden_after: see `DiT.forward`.

        Returns:
            (B, 2C, F, h, w): the mean channels, then the variance channels, in [-1, 1] after training.
            Without learn_sigma only the mean channels, (B, C, F, h, w). With `hidden_after` a pair of it and
            the tokens after that block, (B, F, N, D).

        Raises:
            ValueError: a shape is wrong, or labels are missing or not wanted.
        """
        x, c = self._prepared(x, timestep, condition)
        frames, rows, columns = x.shape[2], x.shape[3] // self.patch_size, x.shape[4] // self.patch_size
        # The frames are stacked into one tall image, so that the patches are cut as a DiT's are.
        x = self.x_embedder(rearrange(x, "b c f h w -> b c (f h) w"))
        x = rearrange(x, "b (f n) d -> b f n d", f=frames)
        split = split_of(self, rows * columns)
        x = split.part(x + self._positions(rows, columns, x.device))
        c = c.unsqueeze(1)  # (B, 1, D)
        rotations: tuple[Rotation | None, ...] = (None,)
        if self.feat_rope is not None and self.temp_rope is not None:
            # A block within frames, then one across frames.
            rotations = (split.rotation(self.feat_rope(rows, columns)), self.temp_rope(frames))
        x, hidden = self._through_blocks(x, c, hidden_after=hidden_after, rotations=rotations, split=split)
        x = split.whole(self.final_layer(x, c))
        x = rearrange(x, "b f n d -> b (f n) d")  # (B, F N, P P out_channels)
        x = self._unpatchify(x, frames * rows, columns)  # (B, out_channels, F h, w)
        x = rearrange(x, "b c (f h) w -> b c f h w", f=frames)
        return x if hidden is None else (x, hidden)

    def _rotation(
        self, number: int, rotations: tuple[Rotation | None, ...], passage: Passage
    ) -> Rotation | None:
        # A route leaves out places, not frames: every second block, across frames, sees all frames.
        return rotations[-1] if number % 2 == 0 else super()._rotation(number, rotations, passage)

    def _before(self, number: int, x: Tensor) -> Tensor:
        # As in the original, after the first block, since that block looks at each frame alone.
        return x + self.temp_embed[:, : x.shape[1]].unsqueeze(2) if number == 2 else x

    def reset_parameters(self) -> None:
        """Draws every parameter anew, like Vchitect/Latte: from the distributions of DiT and in its order."""
        super().reset_parameters()
        # DiT's constructor calls this before temp_embed exists.
        if hasattr(self, "temp_embed"):
            self._reset_frames()

    @torch.no_grad()
    def _reset_frames(self) -> None:
        self.temp_embed.copy_(sincos_frames(self.temp_embed.shape[2], self.num_frames))
        if self.temp_rope is not None:
            self.temp_rope.reset_parameters()

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


with_defaults(Latte, DiT)
MODELS.register_module(name="Latte", module=Latte)
register_sizes("Latte", Latte)
