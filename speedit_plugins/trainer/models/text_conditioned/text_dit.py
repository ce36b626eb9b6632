"""DiT and Latte that read captions, small enough to train from random weights.

A caption reaches the model as one vector: the mean of its tokens. Its embedding is added to that of the
timestep, so that it scales, shifts and gates every block (adaLN-Zero). With `layout_channels` it also becomes
a picture of the input's size, which is concatenated to the input. Sources: the pooled caption beside the
timestep is that of Imagen, Saharia et al. 2022, arXiv:2205.11487, and of SD3, Esser et al. 2024,
arXiv:2403.03206; the projection of a caption to a map is that of text-conditioned GANs, Reed et al. 2016,
arXiv:1605.05396; concatenation to the input is that of SR3, Saharia et al. 2021, arXiv:2104.07636.

Dims: `B` batch, `C` channels, `F` frames, `h`, `w` sides of the input, `L` tokens of a caption, `D` width of
the model, `H` hidden width of the caption's layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedit_plugins.registry import MODELS
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import split_extra
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.linear import Linear


class CaptionEmbedder(nn.Module):
    """The mean of a caption's tokens, through a perceptron: tokens (B, L, text_width), mask (B, L).

    The mean is normalised to mean 0 and variance 1: encoders differ in the size of their features.

    Args:
        text_width: width of a token.
        inner_size: H.
        hidden_size: D.
        layout: shape of the caption's picture, (channels, [F,] h, w); None makes no picture.
    """

    def __init__(
        self, text_width: int, inner_size: int, hidden_size: int, *, layout: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.shape = None if layout is None else tuple(layout)
        self.fc1 = Linear(text_width, inner_size)
        self.fc2 = Linear(inner_size, hidden_size)
        self.layout = None if layout is None else Linear(inner_size, math.prod(layout))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew: N(0, 0.02^2) in front of the modulation, as a DiT's, else Xavier-uniform."""
        for layer in (self.fc1, self.fc2, self.layout):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.fc2.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embedding (B, D), and the picture (B, channels, [F,] h, w) or None."""
        is_read = mask.unsqueeze(2).to(tokens.dtype)
        mean = (tokens * is_read).sum(dim=1) / is_read.sum(dim=1).clamp(min=1.0)  # (B, text_width)
        hidden = F.silu(self.fc1(F.layer_norm(mean, mean.shape[1:])))  # (B, H)
        if self.layout is None or self.shape is None:
            return self.fc2(hidden), None
        return self.fc2(hidden), self.layout(hidden).view(-1, *self.shape)


class ReadsCaptions:
    """What `TextDiT` and `TextLatte` add to the model that they extend: a caption in place of a label."""

    # What the model they are mixed into has.
    caption_embedder: CaptionEmbedder
    extra_channels: int
    in_channels: int

    def _add_captions(
        self, text_width: int, text_length: int, *, inner_size: int, layout: Sequence[int] | None
    ) -> None:
        model = cast(DiT, self)
        self.text_width, self.text_length = text_width, text_length
        # The parent counts the picture's channels as extra ones; in a condition they do not come.
        self.extra_channels -= layout[0] if layout else 0
        self.caption_embedder = CaptionEmbedder(
            text_width, inner_size, model.pos_embed.shape[2], layout=layout
        )
        model.register_buffer("null_tokens", torch.zeros(1, text_length, text_width))
        model.register_buffer("null_mask", torch.zeros(1, text_length, dtype=torch.bool))

    @property
    def null_text(self) -> dict[str, Tensor]:
        """Features of the empty caption: "tokens" (1, L, text_width) and "mask" (1, L)."""
        model = cast(DiT, self)
        return {"tokens": model.get_buffer("null_tokens"), "mask": model.get_buffer("null_mask")}

    def set_null_text(self, features: Mapping[str, Tensor]) -> None:
        """Copies in the features of the empty caption. The state dict contains them."""
        for name, stored in self.null_text.items():
            stored.copy_(features[name])

    def reset_parameters(self) -> None:
        """Draws every parameter anew, those of the blocks as the parent does."""
        cast(Any, super()).reset_parameters()
        # The parent's constructor calls this before the caption's layers exist.
        if hasattr(self, "caption_embedder"):
            self.caption_embedder.reset_parameters()

    def _prepared(self, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """x with the caption's picture and the extra channels, and what modulates the blocks, (B, D)."""
        model = cast(DiT, self)
        extra, text = split_extra(condition, self.extra_channels)
        model._check_shape(x)
        tokens, mask = self._checked(text, timestep, len(x))
        # The features are float32; a training plugin may keep the weights in another type.
        embedded, layout = self.caption_embedder(tokens.to(self.caption_embedder.fc1.weight.dtype), mask)
        parts = [x] if extra is None else [x, extra.to(x.dtype)]
        if layout is not None:
            if layout.shape[2:] != x.shape[2:]:
                raise ValueError(
                    f"a model with layout_channels takes inputs of one size, {tuple(layout.shape[2:])}, got"
                    f" {tuple(x.shape[2:])}"
                )
            parts.append(layout.to(x.dtype))
        c = model.t_embedder(model._embedded_time(timestep)) + embedded
        return torch.cat(parts, dim=1), c

    def _checked(self, text: Condition, timestep: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
        """The caption's tokens and mask; ValueError if they, or the timesteps, do not fit."""
        if timestep.shape != (num_samples,):
            raise ValueError(
                f"the model got timesteps of shape {tuple(timestep.shape)}, wanted ({num_samples},)"
            )
        if not isinstance(text, Mapping) or text["tokens"].shape[2] != self.text_width:
            got = f"width {text['tokens'].shape[2]}" if isinstance(text, Mapping) else "none"
            raise ValueError(f"the model needs caption features of width {self.text_width}, got {got}")
        return text["tokens"], text["mask"]


class TextDiT(ReadsCaptions, DiT):
    """A DiT with a caption in place of a label.

    The arguments that are not listed here mean the same as in `DiT`. The trainer drops captions, so there is
    no dropout of its own.

    Args:
        text_width: width of the text encoder.
        text_length: L, tokens of a caption after padding.
        layout_channels: channels of a picture that the caption is laid out to and that is concatenated to
            the input. It lets small models learn sooner what is where, and takes inputs of one size. 0 makes
            none.
        text_hidden: H; None is hidden_size.

    Raises:
        ValueError: sizes do not divide or are out of range, or the attention is unknown or cannot run.
    """

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice as a DiT's does
        self,
        input_size: int,
        patch_size: int,
        *,
        text_width: int,
        text_length: int,
        layout_channels: int = 0,
        text_hidden: int | None = None,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
        norm: str = "layer",
        qk_norm: bool = False,
        rope: bool = False,
        perceptron: str = "gelu",
    ) -> None:
        _check_caption(layout_channels, text_hidden)
        super().__init__(
            input_size,
            patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=0,
            learn_sigma=learn_sigma,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            extra_channels=extra_channels + layout_channels,
            norm=norm,
            qk_norm=qk_norm,
            rope=rope,
            perceptron=perceptron,
        )
        layout = (layout_channels, input_size, input_size) if layout_channels else None
        self._add_captions(text_width, text_length, inner_size=text_hidden or hidden_size, layout=layout)


class TextLatte(ReadsCaptions, Latte):
    """A Latte with a caption in place of a label.

    The arguments that are not listed here mean the same as in `Latte` and `TextDiT`.

    Args:
        layout_channels: channels of a clip that the caption is laid out to; see `TextDiT`. With it the model
            takes clips of num_frames frames alone.

    Raises:
        ValueError: sizes do not divide or are out of range, or the attention is unknown or cannot run.
    """

    def __init__(  # noqa: PLR0913 - flat, so that a config names each choice as a Latte's does
        self,
        input_size: int,
        patch_size: int,
        *,
        num_frames: int = 16,
        text_width: int,
        text_length: int,
        layout_channels: int = 0,
        text_hidden: int | None = None,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = True,
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        extra_channels: int = 0,
        norm: str = "layer",
        qk_norm: bool = False,
        rope: bool = False,
        perceptron: str = "gelu",
    ) -> None:
        _check_caption(layout_channels, text_hidden)
        super().__init__(
            input_size,
            patch_size,
            num_frames=num_frames,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            num_classes=0,
            learn_sigma=learn_sigma,
            attention=attention,
            gradient_checkpointing=gradient_checkpointing,
            extra_channels=extra_channels + layout_channels,
            norm=norm,
            qk_norm=qk_norm,
            rope=rope,
            perceptron=perceptron,
        )
        layout = (layout_channels, num_frames, input_size, input_size) if layout_channels else None
        self._add_captions(text_width, text_length, inner_size=text_hidden or hidden_size, layout=layout)

    @property
    def taken_frames(self) -> range:
        """Numbers of frames that a clip may have."""
        is_laid_out = self.caption_embedder.layout is not None
        return range(self.num_frames if is_laid_out else 1, self.num_frames + 1)


def _check_caption(layout_channels: int, text_hidden: int | None) -> None:
    """Raises ValueError for widths that are out of range."""
    if layout_channels < 0:
        raise ValueError(f"the model needs layout_channels >= 0 (0: no layout), got {layout_channels}")
    if text_hidden is not None and text_hidden < 1:
        raise ValueError(f"the model needs text_hidden >= 1, got {text_hidden}")


MODELS.register_module(name="TextDiT", module=TextDiT)
MODELS.register_module(name="TextLatte", module=TextLatte)
