"""Embeddings of the timestep and of the class label.

Dims: `B` batch, `D` width of the model, `C` features of a timestep.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

# Source: the transformer's positional wavelengths, Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
MAX_PERIOD = 10_000.0


def timestep_features(timestep: Tensor, num_features: int = 256, *, max_period: float = MAX_PERIOD) -> Tensor:
    """Cosines, then sines, of the timestep at geometrically spaced frequencies, from 1 to above 1/max_period.

    Args:
        timestep: (B,), integer or fractional.
        num_features: C, even and at least 2.
        max_period: all wavelengths are shorter than 2 pi max_period.

    Returns:
        float32 in [-1, 1], shape (B, C).
    """
    if num_features < 2 or num_features % 2:
        raise ValueError(f"timestep_features needs an even num_features >= 2, got {num_features}")
    half = num_features // 2
    rank = torch.arange(half, dtype=torch.float32, device=timestep.device)
    frequency = torch.exp(-math.log(max_period) * rank / half)
    phase = timestep.float().unsqueeze(1) * frequency
    return torch.cat((phase.cos(), phase.sin()), dim=1)


class TimestepEmbedder(nn.Module):
    """Applies a two-layer perceptron to the timestep features: (B,) -> (B, D)."""

    def __init__(self, hidden_size: int, *, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(
            nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, timestep: Tensor) -> Tensor:
        features = timestep_features(timestep, self.num_features)
        # The features are computed in float32, but the layers may have another type.
        return cast(Tensor, self.mlp(features.to(cast(nn.Linear, self.mlp[0]).weight.dtype)))


class LabelEmbedder(nn.Module):
    """A table of class embeddings. If training drops labels, it has one more row, for "no class".

    In training each label becomes `null_label` with probability `dropout_prob`. The draw uses torch's global
    generator, like `nn.Dropout`. Source: classifier-free guidance, Ho and Salimans 2022, arXiv:2207.12598.

    Args:
        num_classes: at least 1; labels are in [0, num_classes).
        hidden_size: D.
        dropout_prob: probability in [0, 1); with 0 the table has no extra row.
    """

    def __init__(self, num_classes: int, hidden_size: int, *, dropout_prob: float) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"LabelEmbedder needs num_classes >= 1, got {num_classes}")
        if not 0 <= dropout_prob < 1:
            raise ValueError(f"LabelEmbedder needs dropout_prob in [0, 1), got {dropout_prob}")
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    @property
    def null_label(self) -> int | None:
        """The label for "no class"; None if the table has no row for it."""
        return self.num_classes if self.dropout_prob > 0 else None

    def forward(self, label: Tensor) -> Tensor:
        """int64 (B,) -> (B, D)."""
        if self.training and self.dropout_prob > 0:
            dropped = torch.rand(label.shape[0], device=label.device) < self.dropout_prob
            label = label.masked_fill(dropped, self.num_classes)
        return cast(Tensor, self.embedding_table(label))
