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
        metadata: of the files: the adapters and what they adapt.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    averages: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]


def weights_to_save(
    engine: Engine,
    trained: Mapping[str, Tensor],
    average: Average,
    shapes: Mapping[str, tuple[int, ...]],
    runtime: Runtime,
) -> SavedWeights:
    """What a checkpoint holds of the weights. Collective.

    Args:
        trained: every trained parameter, on rank 0.
        average: this rank's slices of the averages.
        shapes: of the trained parameters.
    """
    untrained = lora.without_base(engine.module, engine.untrained())
    adapters = lora.adapters_of(engine.module)
    kept = {"": average.slices, **average.others} if average.slices else {}
    averages = {
        label: {**untrained, **master_weights.gather(slices, shapes, runtime)}
        for label, slices in kept.items()
    }
    ema = averages.pop("", {})
    return SavedWeights(
        {**untrained, **trained}, ema, averages, {} if adapters is None else adapters.metadata()
    )


def check_finite(slices: Mapping[str, Slice], runtime: Runtime, consequence: str) -> None:
    """Checks the weights of every rank. Collective.

    Raises:
        ValueError: one is not finite. The message goes on with `consequence`.
    """
    finite = torch.stack([part.values.isfinite().all() for part in slices.values()]).all()
    if runtime.maximum([float(not finite)])[0]:
        raise ValueError(f"a weight is not finite {consequence}")
