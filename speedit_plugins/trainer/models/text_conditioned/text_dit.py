"""DiT and Latte that read captions, small enough to train from random weights.

A caption reaches the model as one vector, the mean of its tokens, or of what a layer makes of each token. The
vector's embedding is added to that of the timestep, so that it scales, shifts and gates every block. Sources:
the pooled caption beside the timestep is that of Imagen, Saharia et al. 2022, arXiv:2205.11487, and of SD3,
Esser et al. 2024, arXiv:2403.03206; a layer before the mean is that of deep sets, Zaheer et al. 2017,
arXiv:1703.06114.

With a `draft` one linear layer also makes a rough sample of the caption, without noise or timestep. The
blocks see it beside the input, and the prediction is the draft plus what they add. Sources: a predicted start
that diffusion refines is that of Whang et al. 2021, arXiv:2112.02475; the join with the input is that of SR3,
Saharia et al. 2021, arXiv:2104.07636.

Dims: `B` batch, `C` channels, `F` frames, `h`, `w` sides of the input, `L` tokens of a caption, `D` width of
the model, `H` hidden width of the caption's layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedit_plugins.registry import MODELS, nearest
from speedit_plugins.trainer.condition import Condition
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.interface import split_extra
from speedit_plugins.trainer.models.latte import Latte
from speedit_plugins.trainer.models.layers.linear import Linear
from speedit_plugins.trainer.models.sizes import with_defaults

# Parents' options that models with captions do not take.
NO_CLASSES: Mapping[str, Any] = {"num_classes": 0, "class_dropout_prob": 0.0}

POOLINGS = ("mean", "words")
"""How a caption becomes one vector: the mean of its tokens, or the mean of a layer on each of them."""


class CaptionEmbedder(nn.Module):
    """A vector of a caption from its tokens (B, L, text_width) and mask (B, L).

    What is read and its mean are normalised to mean 0 and variance 1: encoders differ in the size of their
    features.

    Args:
        text_width: width of a token.
        inner_size: H.
        hidden_size: D.
        pooling: of `POOLINGS`.
        draft: shape of the draft, (C, [F,] h, w); None makes none.
    """

    def __init__(
        self,
        text_width: int,
        inner_size: int,
        hidden_size: int,
        *,
        pooling: str,
        draft: Sequence[int] | None,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            known = ", ".join(POOLINGS)
            raise ValueError(f"unknown text_pooling {pooling!r}{nearest(pooling, POOLINGS)}; known: {known}")
        self.shape = None if draft is None else tuple(draft)
        self.of_token = Linear(text_width, inner_size) if pooling == "words" else None
        self.of_mean = Linear(text_width if self.of_token is None else inner_size, inner_size)
        self.out = Linear(inner_size, hidden_size)
        self.draft = None if draft is None else Linear(inner_size, math.prod(draft))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the weights anew: N(0, 0.02^2) before the modulation, as a DiT's, else Xavier-uniform."""
        for layer in (self.of_token, self.of_mean, self.out, self.draft):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.out.weight, std=0.02)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embedding (B, D), and the draft (B, C, [F,] h, w) or None."""
        is_read = mask.unsqueeze(2).to(tokens.dtype)
        if self.of_token is not None:
            tokens = F.silu(self.of_token(_normalised(tokens)))  # (B, L, H)
        mean = (tokens * is_read).sum(dim=1) / is_read.sum(dim=1).clamp(min=1.0)
        hidden = F.silu(self.of_mean(_normalised(mean)))  # (B, H)
        if self.draft is None or self.shape is None:
            return self.out(hidden), None
        return self.out(hidden), self.draft(hidden).view(-1, *self.shape)


def _normalised(features: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the last dim."""
    return F.layer_norm(features, features.shape[-1:])


class ReadsCaptions:
    """What `TextDiT` and `TextLatte` add to the model that they extend: a caption in place of a label."""

    def _add_captions(
        self,
        text_width: int,
        text_length: int,
        *,
        inner_size: int | None,
        pooling: str,
        draft: Sequence[int] | None,
    ) -> None:
        """Adds the caption's layers. `draft` is the shape of a draft, (C, [F,] h, w); None makes none."""
        model = cast(DiT, self)
        hidden_size = model.pos_embed.shape[2]
        if inner_size is not None and inner_size < 1:
            raise ValueError(f"the model needs text_hidden >= 1, got {inner_size}")
        self.text_width, self.text_length = text_width, text_length
        self.caption_embedder = CaptionEmbedder(
            text_width, inner_size or hidden_size, hidden_size, pooling=pooling, draft=draft
        )
        self.draft_gate = None
        if draft is not None:
            self.draft_gate = Linear(hidden_size, draft[0])
            # The parent counts the draft's channels as extra ones; in a condition they do not come.
            model.extra_channels -= draft[0]
        model.register_buffer("null_tokens", torch.zeros(1, text_length, text_width))
        model.register_buffer("null_mask", torch.zeros(1, text_length, dtype=torch.bool))
        self._reset_captions()

    @property
    def null_text(self) -> dict[str, Tensor]:
        """Features of the empty caption: "tokens" (1, L, text_width) and "mask" (1, L)."""
        model = cast(DiT, self)
        return {"tokens": model.get_buffer("null_tokens"), "mask": model.get_buffer("null_mask")}

    @property
    def is_of_one_size(self) -> bool:
        """Whether every input has the sides `input_size`: a draft is laid out for them."""
        return self.draft_gate is not None

    def set_null_text(self, features: Mapping[str, Tensor]) -> None:
        """Copies in the features of the empty caption. The state dict contains them."""
        for name, stored in self.null_text.items():
            stored.copy_(features[name])

    def reset_parameters(self) -> None:
        """Draws every parameter anew, those of the blocks as the parent does."""
        cast(Any, super()).reset_parameters()
        # The parent's constructor calls this before the caption's layers exist.
        if hasattr(self, "caption_embedder"):
            self._reset_captions()

    @torch.no_grad()
    def _reset_captions(self) -> None:
        self.caption_embedder.reset_parameters()
        if self.draft_gate is not None:
            # At the start the draft itself is the prediction, at every timestep.
            nn.init.zeros_(self.draft_gate.weight)
            nn.init.ones_(self.draft_gate.bias)

    def forward(
        self, x: Tensor, timestep: Tensor, condition: Condition = None, *, hidden_after: int = 0
    ) -> Any:
        """Prediction for a noised input, as the parent's.

        Args:
            x: (B, C, [F,] h, w).
            timestep: (B,), timestep in [0, T) of the process without respacing, integer or fractional.
            condition: "tokens" (B, L, text_width) and "mask" (B, L), and with extra_channels "extra".
            hidden_after: number of a block, counted from 1, whose output is wanted too; 0 wants none.

        Returns:
            (B, C, ...), or with learn_sigma (B, 2C, ...); with `hidden_after` a pair of it and the tokens.

        Raises:
            ValueError: a shape is wrong, or the caption is missing or has features of another width.
        """
        model = cast(DiT, self)
        extra, text = split_extra(condition, model.extra_channels)
        model._check_shape(x)
        embedded, draft = self._read(text)
        if timestep.shape != x.shape[:1]:
            raise ValueError(
                f"the model got timesteps of shape {tuple(timestep.shape)}, wanted ({x.shape[0]},)"
            )
        if draft is not None and draft.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"a model with a draft takes inputs of one size, {tuple(draft.shape[2:])}, got"
                f" {tuple(x.shape[2:])}"
            )
        c = model._embedded(timestep, condition) + embedded
        parts = [part.to(x.dtype) for part in (extra, draft) if part is not None]
        given = {"modulation": c, "joined": torch.cat([x, *parts], dim=1)}
        found = cast(Any, super()).forward(x, timestep, given, hidden_after=hidden_after)
        if draft is None or self.draft_gate is None:
            return found
        prediction = found[0] if hidden_after else found
        gate = self.draft_gate(F.silu(c)).view(*c.shape[:1], -1, *[1] * (x.ndim - 2))  # (B, C, 1, ...)
        C = draft.shape[1]
        prediction = torch.cat([prediction[:, :C] + gate * draft, prediction[:, C:]], dim=1)
        return (prediction, found[1]) if hidden_after else prediction

    def _prepared(self, x: Tensor, timestep: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """What `forward` prepared: x with the draft and the extra channels, and what modulates, (B, D)."""
        given = cast(Mapping[str, Tensor], condition)
        return given["joined"], given["modulation"]

    def _read(self, text: Condition) -> tuple[Tensor, Tensor | None]:
        """The embedding of captions (B, D), and their drafts; ValueError if the captions do not fit."""
        if not isinstance(text, Mapping) or text["tokens"].shape[2] != self.text_width:
            got = f"width {text['tokens'].shape[2]}" if isinstance(text, Mapping) else "none"
            raise ValueError(f"the model needs caption features of width {self.text_width}, got {got}")
        # The features are float32; a training plugin may keep the weights in another type.
        tokens = text["tokens"].to(self.caption_embedder.out.weight.dtype)
        return cast(tuple[Tensor, Tensor | None], self.caption_embedder(tokens, text["mask"]))


class TextDiT(ReadsCaptions, DiT):
    """A DiT with a caption in place of a label.

    The arguments that are not listed here mean the same as in `DiT`. The trainer drops captions, so there is
    no dropout of its own.

    Args:
        text_width: width of the text encoder.
        text_length: L, tokens of a caption after padding.
        draft: make a draft of each caption. A model of x_0 learns captions much sooner with it. It has H
            weights for each value of a sample, and takes inputs of one size.
        text_hidden: H; None is hidden_size.
        text_pooling: "mean" of the tokens, or of a layer on each of the "words". Captions that differ in one
            word differ little in the mean, and more with the layer.

    Raises:
        ValueError: sizes do not divide or are out of range, or the attention is unknown or cannot run.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        *,
        text_width: int,
        text_length: int,
        draft: bool = False,
        text_hidden: int | None = None,
        text_pooling: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(input_size, patch_size, **NO_CLASSES, **_with_draft(options, draft=draft))
        shape = (self.in_channels, input_size, input_size) if draft else None
        self._add_captions(text_width, text_length, inner_size=text_hidden, pooling=text_pooling, draft=shape)


class TextLatte(ReadsCaptions, Latte):
    """A Latte with a caption in place of a label.

    The arguments that are not listed here mean the same as in `Latte` and `TextDiT`.

    Args:
        draft: make a draft of each caption. The model then takes clips of num_frames frames alone.

    Raises:
        ValueError: sizes do not divide or are out of range, or the attention is unknown or cannot run.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        *,
        text_width: int,
        text_length: int,
        draft: bool = False,
        text_hidden: int | None = None,
        text_pooling: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(input_size, patch_size, **NO_CLASSES, **_with_draft(options, draft=draft))
        shape = (self.in_channels, self.num_frames, input_size, input_size) if draft else None
        self._add_captions(text_width, text_length, inner_size=text_hidden, pooling=text_pooling, draft=shape)

    @property
    def taken_frames(self) -> range:
        """Numbers of frames that a clip may have."""
        is_laid_out = self.caption_embedder.draft is not None
        return range(self.num_frames if is_laid_out else 1, self.num_frames + 1)


def _with_draft(options: Mapping[str, Any], *, draft: bool) -> dict[str, Any]:
    """The parent's options: a draft comes as extra channels beside x, as many as x has."""
    channels = options.get("in_channels", 4)
    extra = options.get("extra_channels", 0) + (channels if draft else 0)
    return {**options, "in_channels": channels, "extra_channels": extra}


for _model, _parent in ((TextDiT, DiT), (TextLatte, Latte)):
    with_defaults(_model, _parent, without=NO_CLASSES)
MODELS.register_module(name="TextDiT", module=TextDiT)
MODELS.register_module(name="TextLatte", module=TextLatte)
