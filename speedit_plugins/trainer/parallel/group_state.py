"""The numbers that an optimizer keeps in its parameter groups, such as Prodigy's estimate d.

A value that changed since the optimizer was built is state, and is saved; the trainer changes `lr` alone. All
others are options, and come from the config.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.parallel.master_weights import plain_value

# What the trainer owns: the parameters, and the rate that it sets in each step.
_NOT_STATE = ("params", "lr")


def group_values(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A copy of the values of each parameter group, without parameters and learning rate."""
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key not in _NOT_STATE}
        for group in optimizer.param_groups
    ]


def changed_values(
    optimizer: torch.optim.Optimizer, built: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The values of each group that changed since `built`, the `group_values` of the new optimizer.

    Raises:
        ValueError: one of them cannot be saved.
    """
    return [
        {
            key: plain_value(f"{key!r} of the optimizer's parameter group", value)
            for key, value in group.items()
            if key not in _NOT_STATE and not (key in before and _is_equal(value, before[key]))
        }
        for group, before in zip(optimizer.param_groups, built, strict=True)
    ]


def load_group_values(optimizer: torch.optim.Optimizer, changed: Sequence[Mapping[str, Any]]) -> None:
    """Restores `changed_values`.

    Raises:
        ValueError: the optimizer has another number of groups.
    """
    if changed and len(changed) != len(optimizer.param_groups):
        raise ValueError(
            f"the optimizer had {len(changed)} parameter groups, got {len(optimizer.param_groups)}"
        )
    for group, values in zip(optimizer.param_groups, changed, strict=False):
        group.update(values)


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
