"""Alignment: tokens inside the model are drawn to features of the clean sample, by cosine similarity.

Dims: `B` samples, `F` frames (absent for images), `N` tokens, `D` width of the model, `Z` width of the
features, `h'`, `w'` sides of the teacher's map.
"""

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from speedit_plugins.trainer.accelerations.objective import Acceleration, Outcome
from speedit_plugins.trainer.diffusion.gaussian_process import LossTerms
from speedit_plugins.trainer.inputs import FeatureSource
from speedit_plugins.trainer.models.training_only import add_layer

PROJECTOR = "projector"


class Alignment(Acceleration):
    """Subtracts `weight` times the mean cosine similarity of projected tokens and a target from the loss.

    The policy's weight of the timestep does not scale it, as in REPA's release.

    Args:
        model: gets the projector as a training-only layer.
        projector: from the model's tokens to the features.
        layer: number of the block, counted from 1, whose output is aligned.
        weight: > 0.
        until: steps after which the term is off; None keeps it.
        autocast: the context in which the projector runs.
    """

    def __init__(  # noqa: PLR0913 - flat, as the config names each choice
        self,
        model: nn.Module,
        projector: nn.Module,
        *,
        layer: int,
        weight: float,
        until: int | None,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        add_layer(model, PROJECTOR, projector)
        self._projector, self._autocast = projector, autocast
        self._layer, self._weight, self._until = layer, weight, until
        self.is_on = True

    def advance(self, step: int) -> None:
        self.is_on = self._until is None or step < self._until

    def asked(self) -> dict[str, Any]:
        return {"hidden_after": self._layer} if self.is_on else {}

    def terms(self, outcome: Outcome, terms: LossTerms) -> LossTerms:
        if not self.is_on:
            # A gradient of zero: DistributedDataParallel and ZeRO wait for one of every parameter.
            nothing = torch.stack([parameter.sum() for parameter in self._projector.parameters()]).sum()
            return replace(terms, loss=terms.loss + 0.0 * nothing.to(terms.loss.dtype))
        target = self.target(outcome)  # (B, [F,] N, Z)
        with self._autocast():
            tokens = self._projected(outcome.hidden)  # (B, [F,] N, Z)
        if tokens.shape != target.shape:
            raise ValueError(
                f"alignment got tokens of shape {tuple(tokens.shape)} and features of {tuple(target.shape)};"
                " wanted a feature for each token"
            )
        similarity = alignment(tokens, target)
        return replace(terms, loss=terms.loss - self._weight * similarity, alignment=similarity)

    def rehearse(self, predict: Callable[..., Any], x_t: Tensor, hidden: Tensor | None) -> None:
        self._projected(hidden)

    def _projected(self, hidden: Tensor | None) -> Tensor:
        # The weights are of another type than the tokens if a plugin casts the model.
        return cast(
            Tensor, self._projector(cast(Tensor, hidden).to(next(self._projector.parameters()).dtype))
        )

    @abstractmethod
    def target(self, outcome: Outcome) -> Tensor:
        """What the projected tokens are drawn to, (B, [F,] N, Z), without gradient."""


class FeatureAlignment(Alignment):
    """REPA: the target is a frozen vision network's map of the clean sample.

    Where the teacher's map has another grid than the model's tokens, it is interpolated bilinearly, with
    antialiasing where it shrinks.

    Source: Yu et al. 2024, arXiv:2410.06940, equation 8; the early end: HASTE, arXiv:2505.16792.

    Args:
        model: see `Alignment`; its `patch_size` gives the grid of the tokens.
        projector: see `Alignment`.
        teacher: is told whether it is wanted.
        options: see `Alignment`.
    """

    def __init__(
        self, model: nn.Module, projector: nn.Module, *, teacher: FeatureSource, **options: Any
    ) -> None:
        super().__init__(model, projector, **options)
        self._teacher, self._patch = teacher, cast(int, model.patch_size)

    def advance(self, step: int) -> None:
        super().advance(step)
        self._teacher.is_wanted = self.is_on

    def target(self, outcome: Outcome) -> Tensor:
        assert outcome.given.features is not None
        rows, columns = (side // self._patch for side in outcome.noised.x_t.shape[-2:])
        return on_grid(outcome.given.features, rows, columns)


def alignment(tokens: Tensor, target: Tensor) -> Tensor:
    """Mean cosine similarity per sample, (B,) in [-1, 1], float32 or wider.

    Args:
        tokens: (B, ..., N, Z).
        target: in the same shape.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    return functional.cosine_similarity(tokens.to(wide), target.to(wide), dim=-1).flatten(1).mean(1)


def on_grid(features: Tensor, rows: int, columns: int) -> Tensor:
    """A map of features (B, [F,] Z, h', w') as one feature for each token, (B, [F,] rows columns, Z)."""
    if features.shape[-2:] != (rows, columns):
        whole = features.reshape(-1, *features.shape[-3:])
        whole = functional.interpolate(whole, (rows, columns), mode="bilinear", antialias=True)
        features = whole.reshape(*features.shape[:-2], rows, columns)
    return rearrange(features, "... z h w -> ... (h w) z")


def build_projector(width: int, inner: int, out: int) -> nn.Sequential:
    """REPA's projector: three linear layers with SiLU between, D -> inner -> inner -> Z.

    Weights are Xavier-uniform and biases zero, as in the release.
    """
    return _initialised(
        nn.Sequential(
            nn.Linear(width, inner),
            nn.SiLU(),
            nn.Linear(inner, inner),
            nn.SiLU(),
            nn.Linear(inner, out),
        )
    )


def build_head(width: int, inner: int) -> nn.Sequential:
    """SRA's projector: two linear layers with a SiLU between, D -> inner -> D; weights as in REPA's."""
    return _initialised(nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width)))


def _initialised(layers: nn.Sequential) -> nn.Sequential:
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return layers
