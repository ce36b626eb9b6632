"""Masked training: a second pass of each batch, in which the model's encoder sees a part of the tokens.

Dims: `B` samples, `N` tokens, `K` kept tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from speedit_plugins.trainer.accelerations.objective import Acceleration, Outcome
from speedit_plugins.trainer.build import Process
from speedit_plugins.trainer.config.accelerations import MaskingConfig
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms
from speedit_plugins.trainer.models.mdt import MDT


class Masking(Acceleration):
    """Adds the loss of the masked pass to that of the full one, at the same timesteps and noise.

    The policy weighs both. Each pass drops labels by its own draw, as in sail-sg/MDT. The mask comes from
    torch's global generator, seeded by the trainer for each step and rank. The policy learns from the full
    pass alone, as samples are drawn with it.

    Source: Gao et al. 2023, arXiv:2303.14389, and `forward_backward` of its training code.

    Args:
        process: scores the prediction.
        num_tokens: N.
        ratio: least share of masked tokens, in (0, 1).
        spread: the share is drawn uniformly from [ratio, ratio + spread] for each batch; ratio + spread < 1.

    Raises:
        ValueError: no token would be left, or none masked.
    """

    def __init__(self, process: Process, *, num_tokens: int, ratio: float, spread: float) -> None:
        for share in (ratio, ratio + spread):
            if not 1 <= num_kept(num_tokens, share) < num_tokens:
                raise ValueError(
                    f"masking.ratio needs to leave some of the {num_tokens} tokens and mask some, got a share"
                    f" of {share:g}"
                )
        self._process, self._num_tokens = process, num_tokens
        self._ratio, self._spread = ratio, spread

    def terms(self, outcome: Outcome, terms: LossTerms) -> LossTerms:
        # Drawn out here, not in the model: gradient checkpointing runs its blocks again.
        share = self._ratio + self._spread * float(torch.rand((), device="cpu"))
        x = outcome.noised.x_t
        kept = draw_kept(len(x), self._num_tokens, share, device=x.device)
        masked = self._process.loss(outcome.predict(kept=kept), outcome.noised, outcome.draw)
        bound = None if terms.bound is None or masked.bound is None else terms.bound + masked.bound
        return replace(terms, loss=terms.loss + masked.loss, bound=bound)

    def rehearse(self, predict: Callable[..., Any], x_t: Tensor, hidden: Tensor | None) -> None:
        predict(kept=draw_kept(len(x_t), self._num_tokens, self._ratio, device=x_t.device))


def num_kept(num_tokens: int, share: float) -> int:
    """K for a share of masked tokens, rounded down as in sail-sg/MDT."""
    return int(num_tokens * (1 - share))


def draw_kept(batch: int, num_tokens: int, share: float, *, device: torch.device) -> Tensor:
    """Places of K tokens of each sample, by torch's global generator, int64 (B, K)."""
    return torch.rand(batch, num_tokens, device=device).argsort(dim=1)[:, : num_kept(num_tokens, share)]


def build_masking(options: MaskingConfig, model: nn.Module, process: Process) -> Masking | None:
    """The masking of a config; None if it is off.

    Raises:
        ValueError: the model has no masked pass; or it has one, and the masking is off: without it the
            side-interpolator gets no gradient.
    """
    name = type(model).__name__
    if options.type == "none":
        if isinstance(model, MDT):
            raise ValueError(
                f"masking.type needs MDT to train {name}, got none: only the masked pass trains its"
                " side-interpolator; a DiT is the model without it"
            )
        return None
    if not isinstance(model, MDT):
        raise ValueError(
            f"masking.type: {options.type} needs a model with a masked pass, MDT or MDTv2, got {name}"
        )
    spread = model.mask_spread if options.spread is None else options.spread
    return Masking(process, num_tokens=model.num_tokens, ratio=options.ratio, spread=spread)
