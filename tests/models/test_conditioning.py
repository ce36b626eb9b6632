import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from speedit_plugins.trainer.models.layers.conditioning import (
    LabelEmbedder,
    TimestepEmbedder,
    timestep_features,
)


def test_timestep_features_equal_the_formula() -> None:
    timestep = torch.tensor([0.0, 1.0, 37.5, 999.0])
    features = timestep_features(timestep, 8)
    assert features.shape == (4, 8)
    for row, time in zip(features, timestep.tolist(), strict=True):
        for i in range(4):
            angle = time * 10_000 ** (-i / 4)
            # Float32 phases up to 999 are off by 999 * 2^-23.
            assert_close(row[i].item(), math.cos(angle), atol=1.5e-4, rtol=0)
            assert_close(row[4 + i].item(), math.sin(angle), atol=1.5e-4, rtol=0)


def test_integer_and_fractional_timesteps_agree() -> None:
    assert torch.equal(
        timestep_features(torch.tensor([7, 400])), timestep_features(torch.tensor([7.0, 400.0]))
    )


def test_an_odd_number_of_features_is_refused() -> None:
    with pytest.raises(ValueError, match="even num_features >= 2, got 7"):
        timestep_features(torch.tensor([1]), 7)


def test_timestep_embedder_is_a_perceptron_over_the_features() -> None:
    embedder = TimestepEmbedder(6, num_features=8)
    timestep = torch.tensor([3, 500])
    first, last = embedder.mlp[0], embedder.mlp[2]
    inner = timestep_features(timestep, 8) @ first.weight.T + first.bias
    wanted = (inner * torch.sigmoid(inner)) @ last.weight.T + last.bias
    assert_close(embedder(timestep), wanted)


def test_labels_are_dropped_at_the_given_rate_from_the_global_generator() -> None:
    embedder = LabelEmbedder(3, 1, dropout_prob=0.25)
    with torch.no_grad():
        embedder.embedding_table.weight.copy_(torch.arange(4.0).unsqueeze(1))
    labels = torch.arange(40_000) % 3
    torch.manual_seed(0)
    seen = embedder(labels).squeeze(1).long()
    dropped = seen == 3
    assert torch.equal(seen[~dropped], labels[~dropped])
    # 4 sigma of a binomial frequency: 4 * sqrt(0.25 * 0.75 / 40_000).
    assert abs(dropped.float().mean().item() - 0.25) < 0.0087
    torch.manual_seed(0)
    assert torch.equal(embedder(labels).squeeze(1).long(), seen)
    assert torch.equal(embedder.eval()(labels).squeeze(1).long(), labels)


def test_the_null_label_exists_only_with_dropout() -> None:
    with_null, without = LabelEmbedder(3, 2, dropout_prob=0.1), LabelEmbedder(3, 2, dropout_prob=0.0)
    assert (with_null.null_label, without.null_label) == (3, None)
    assert isinstance(without.embedding_table, nn.Embedding)
    assert (with_null.embedding_table.num_embeddings, without.embedding_table.num_embeddings) == (4, 3)


@pytest.mark.parametrize(
    ("classes", "dropout", "message"),
    [(0, 0.1, "num_classes >= 1, got 0"), (3, -0.1, r"dropout_prob in \[0, 1\), got -0.1")],
)
def test_impossible_embedders_are_refused(classes: int, dropout: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelEmbedder(classes, 2, dropout_prob=dropout)
