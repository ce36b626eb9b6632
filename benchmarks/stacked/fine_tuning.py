"""Trainings that go on from trained weights: with all weights, or with low-rank additions (LoRA).

Dims: `M` members, `B` rows of a member's batch, `I` and `O` features of a layer, `R` rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.image_sets import ImageSet
from benchmarks.stacked.dit import StackedLinear, member_weights, stacked
from benchmarks.stacked.training import Member, Shape, StackedTraining, first_model
from speedit_plugins.trainer.models.dit import DiT


@dataclass(frozen=True, eq=False)
class Start:
    """Where the members of a fine-tuning start.

    Args:
        data: what the first training sees, with uniform draws.
        steps: of the first training.
        rank: R of the additions; 0 trains all weights.
        folder: keeps the weights of each seed.
        name: of their files.
    """

    data: ImageSet
    steps: int
    rank: int
    folder: Path
    name: str

    def model(self, seed: int, shape: Shape) -> DiT:
        """The model that all members of the seed start from, trained once and then read from the folder."""
        path = self.folder / f"{self.name}_{seed}.pt"
        if not path.exists():
            member = Member("uniform", seed, prediction_type="flow")
            training = StackedTraining([member], self.data, "rectified_flow", shape)
            while training.step < self.steps:
                training.train_step()
            torch.save(training.averaged_weights(0), path)
        model = first_model(self.data, shape, seed)
        weights = torch.load(path, weights_only=True)
        model.load_state_dict({**model.state_dict(), **weights})
        return model


def going_on(members: Sequence[Member], data: ImageSet, shape: Shape, start: Start) -> StackedTraining:
    """A stack that trains on `data` from where the start leaves each member's seed."""
    models = [start.model(member.seed, shape) for member in members]
    if start.rank:
        return _LowRankTraining(members, data, shape, models, start.rank)
    return StackedTraining(members, data, "rectified_flow", shape, model=stacked(models))


class _LowRankTraining(StackedTraining):
    """Trains additions to the linear layers of the blocks and the table of the classes, nothing else."""

    def __init__(
        self, members: Sequence[Member], data: ImageSet, shape: Shape, models: Sequence[DiT], rank: int
    ) -> None:
        model = stacked(models)
        self._frozen = dict(model.named_parameters())
        for name, parameter in self._frozen.items():
            parameter.requires_grad_(name.startswith("y_embedder"))
        _add_low_rank(model.blocks, rank)
        super().__init__(members, data, "rectified_flow", shape, model=model)

    def averaged_weights(self, member: int) -> dict[str, Tensor]:
        found = member_weights(
            {n: p.detach() for n, p in self._frozen.items() if "pos_embed" not in n}, member
        )
        for name, value in self.averages.items():
            if name.endswith(".down"):
                layer = name.removesuffix(".down")
                up = self.averages[f"{layer}.up"][member]
                found[f"{layer}.weight"] = found[f"{layer}.weight"] + up @ value[member]
            elif not name.endswith(".up"):
                found[name] = value[member]
        return found


class _LowRankLinear(nn.Module):
    """A frozen `StackedLinear` plus a product of two thin matrices per member, 0 at first.

    Source: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, layer: StackedLinear, rank: int) -> None:
        super().__init__()
        members, outputs, inputs = layer.weight.shape
        self.weight, self.bias = layer.weight, layer.bias
        # The same for each member: their seeds may differ, their laws must not see another start.
        first = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(0)) / inputs**0.5
        self.down = nn.Parameter(first.repeat(members, 1, 1))  # (M, R, I)
        self.up = nn.Parameter(torch.zeros(members, outputs, rank))  # (M, O, R)

    def forward(self, x: Tensor) -> Tensor:
        members, outputs, inputs = self.weight.shape
        rows = x.reshape(members, -1, inputs)  # (M, B ..., I)
        plain = torch.baddbmm(self.bias.unsqueeze(1), rows, self.weight.transpose(1, 2))
        added = torch.bmm(torch.bmm(rows, self.down.transpose(1, 2)), self.up.transpose(1, 2))
        return (plain + added).view(*x.shape[:-1], outputs)


def _add_low_rank(whole: nn.Module, rank: int) -> None:
    for name, child in list(whole.named_children()):
        if isinstance(child, StackedLinear):
            setattr(whole, name, _LowRankLinear(child, rank))
        else:
            _add_low_rank(child, rank)
