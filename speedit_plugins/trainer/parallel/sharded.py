"""What the engines with a sharded optimizer share: each rank steps its own slices of the weights."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.trainer.config.schema import ExperimentConfig
from speedit_plugins.trainer.parallel.group_state import changed_values, load_group_values
from speedit_plugins.trainer.parallel.master_weights import (
    Master,
    Slice,
    load_optimizer,
    optimizer_layout,
    optimizer_slices,
)
from speedit_plugins.trainer.parallel.optimizers import has_two_points
from speedit_plugins.trainer.parallel.runtime import Runtime


class Sharded:
    """The optimizer of an engine over `masters`, this rank's slices of the trained weights.

    A subclass sets the attributes.
    """

    optimizer: torch.optim.Optimizer
    masters: list[Master]
    _built_groups: list[dict[str, Any]]

    def autocast(self) -> AbstractContextManager[Any]:
        """Does nothing: the model computes in its precision already."""
        return nullcontext()

    def micro_batch(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Does nothing: each backward pass adds to the sharded gradients."""
        return nullcontext()

    def evaluation_point(self) -> AbstractContextManager[bool]:
        """Does nothing: the optimizers of these plugins train and evaluate at the same weights."""
        return nullcontext(False)

    def moments(self, runtime: Runtime) -> dict[str, Slice]:
        """This rank's part of the optimizer's moments, by name."""
        return optimizer_slices(self.optimizer, self.masters, runtime)

    def optimizer_state(self) -> dict[str, Any]:
        """What else the optimizer needs to go on, see `Replica.optimizer_state`."""
        changed = changed_values(self.optimizer, self._built_groups)
        return {"layout": optimizer_layout(self.optimizer, self.masters), "groups": changed}

    def load_moments(self, whole: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restores `moments` and `optimizer_state`, see `Replica.load_moments`."""
        load_optimizer(self.optimizer, self.masters, whole, state.get("layout"))
        load_group_values(self.optimizer, state.get("groups", ()))


def check_one_point(optimizer: torch.optim.Optimizer, config: ExperimentConfig) -> None:
    """Nothing, if the optimizer takes gradients where the model is evaluated.

    Raises:
        ValueError: it has two points, which need whole weights.
    """
    if has_two_points(optimizer):
        raise ValueError(f"optimizer {config.optimizer.type!r} with train() and eval() needs plugin ddp")
