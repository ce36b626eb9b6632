"""The weights that a checkpoint holds: the model's, its averages', and what they adapt."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from speedit_plugins.trainer.models import lora
from speedit_plugins.trainer.parallel import master_weights
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.parallel.replica import Engine
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.averages.ema import Average


@dataclass(frozen=True)
class SavedWeights:
    """State dicts on rank 0; on other ranks only what is not trained.

    Args:
        model: the model's. With adapters, without the weights that they adapt.
        ema: the average's; empty if none is kept.
        averages: further averages' by label.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    averages: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class HeldWeights:
    """The weights of a checkpoint, as far as one rank holds them.

    Args:
        untrained: buffers and frozen parameters, without those that adapters adapt.
        trained: this rank's slices of the trained parameters.
        averages: its slices of each average by label; that of the first is "". Empty if none is kept.
        shapes: of the trained parameters.
        metadata: of the files: the adapters and what they adapt.
    """

    untrained: Mapping[str, Tensor]
    trained: Mapping[str, Slice]
    averages: Mapping[str, Mapping[str, Slice]]
    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]

    def gathered(self, runtime: Runtime) -> SavedWeights:
        """The whole weights on rank 0. Collective."""
        model, *averages = (
            {**self.untrained, **master_weights.gather(slices, self.shapes, runtime)}
            for slices in (self.trained, *self.averages.values())
        )
        by_label = dict(zip(self.averages, averages, strict=True))
        return SavedWeights(model, by_label.pop("", {}), by_label)


def hold_weights(
    engine: Engine, slices: Mapping[str, Slice], average: Average, shapes: Mapping[str, tuple[int, ...]]
) -> HeldWeights:
    """What a checkpoint of this step holds of the weights: views of those that are trained. Collective.

    Args:
        slices: this rank's of the trained parameters.
        average: this rank's slices of the averages.
        shapes: of the trained parameters.
    """
    with engine.evaluation_point() as is_moved:
        # Elsewhere the weights are others.
        trained = copied(slices) if is_moved else slices
    untrained = lora.without_base(engine.module, engine.untrained())
    adapters = lora.adapters_of(engine.module)
    averages = {"": average.slices, **average.others} if average.slices else {}
    return HeldWeights(untrained, trained, averages, shapes, {} if adapters is None else adapters.metadata())


def copied(slices: Mapping[str, Slice]) -> dict[str, Slice]:
    """The slices in memory of their own."""
    return {name: Slice(part.start, part.values.clone()) for name, part in slices.items()}


def check_finite(slices: Mapping[str, Slice], runtime: Runtime, consequence: str) -> None:
    """Checks the weights of every rank. Collective.

    Raises:
        ValueError: one is not finite. The message goes on with `consequence`.
    """
    finite = torch.stack([part.values.isfinite().all() for part in slices.values()]).all()
    if runtime.maximum([float(not finite)])[0]:
        raise ValueError(f"a weight is not finite {consequence}")
