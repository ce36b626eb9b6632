"""The parts of a model that are sharded, and recomputed, one after the other."""

from torch import nn


def units(model: nn.Module) -> list[nn.Module]:
    """The blocks whose weights are gathered together: members of the outermost module lists."""
    found: list[nn.Module] = []
    for child in model.children():
        found += child if isinstance(child, nn.ModuleList) else units(child)
    return [unit for unit in found if any(True for _ in unit.parameters())]
