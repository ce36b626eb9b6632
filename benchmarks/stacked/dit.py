"""Many DiTs of one shape as one model: each layer has all members' weights in one tensor, and one product.

Between the layers the DiT's own code runs on the members' batches, one after the other along the batch.
Attention and norms have no weights, so members make no difference to them.

Dims: `M` members, `B` rows of a member's batch, `N` tokens, `C` channels, `P` patch edge, `K` rows of a
table, `I` and `O` features of a layer.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.blocks import PatchEmbedder, patches_of


def stacked(models: Sequence[DiT]) -> DiT:
    """One model for inputs (M B, ...), member after member. Each of its trained parameters is (M, ...).

    Each parameter keeps its name. Positions are not trained and stay as they are in a single model.

    Args:
        models: built with the same options, without label dropout, as one draw would be for all members.
    """
    embedder = models[0].y_embedder
    if embedder is not None and embedder.dropout_prob > 0:
        raise ValueError(f"stacked needs class_dropout_prob 0, got {embedder.dropout_prob}")
    whole = copy.deepcopy(models[0])
    _replace_layers(whole, models)
    return whole


def member_weights(parameters: dict[str, Tensor], member: int) -> dict[str, Tensor]:
    """The weights that one member's DiT loads: views of its rows of the trained parameters (M, ...)."""
    return {name: stack[member] for name, stack in parameters.items()}


class StackedLinear(nn.Module):
    """One linear layer per member: (M B, ..., I) -> (M B, ..., O)."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = _stack([layer.weight for layer in layers])  # (M, O, I)
        self.bias = _stack([layer.bias for layer in layers])  # (M, O)

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class StackedPatches(nn.Module):
    """One patch embedding per member: (M B, C, H, W) -> (M B, N, O)."""

    def __init__(self, embedders: Sequence[PatchEmbedder]) -> None:
        super().__init__()
        self.edge = embedders[0].proj.kernel_size[0]
        self.proj = nn.Module()
        self.proj.weight = _stack([embedder.proj.weight for embedder in embedders])  # (M, O, C, P, P)
        self.proj.bias = _stack([embedder.proj.bias for embedder in embedders])  # (M, O)

    def forward(self, x: Tensor) -> Tensor:
        patches = patches_of(x, self.edge)  # (M B, N, C P P)
        return _linear(patches, self.proj.weight.flatten(2), self.proj.bias)  # (M B, N, O)


class StackedEmbedding(nn.Module):
    """One table of K rows per member: int64 (M B,) in [0, K) -> (M B, O)."""

    def __init__(self, tables: Sequence[nn.Embedding]) -> None:
        super().__init__()
        self.weight = _stack([table.weight for table in tables])  # (M, K, O)

    def forward(self, index: Tensor) -> Tensor:
        members, rows, _ = self.weight.shape
        first = torch.arange(members, device=index.device).unsqueeze(1) * rows  # (M, 1)
        return F.embedding((index.view(members, -1) + first).flatten(), self.weight.flatten(0, 1))


def _replace_layers(whole: nn.Module, parts: Sequence[nn.Module]) -> None:
    """Replaces each layer of `whole` that has weights, at any depth, by the layers of all `parts` as one."""
    for name, child in list(whole.named_children()):
        children = [getattr(part, name) for part in parts]
        for kind, replacement in _STACKED.items():
            if isinstance(child, kind):
                setattr(whole, name, replacement(children))
                break
        else:
            _replace_layers(child, children)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(M B, ..., I), weight (M, O, I), bias (M, O) -> (M B, ..., O)."""
    members, features = bias.shape
    rows = x.reshape(members, -1, x.shape[-1])  # (M, B ..., I)
    return torch.baddbmm(bias.unsqueeze(1), rows, weight.transpose(1, 2)).view(*x.shape[:-1], features)


def _stack(parameters: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([parameter.detach() for parameter in parameters]))


_STACKED = {PatchEmbedder: StackedPatches, nn.Linear: StackedLinear, nn.Embedding: StackedEmbedding}
