"""What one rank holds of a checkpoint, before the ranks put it together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speedit_plugins.trainer.checkpoints import Contents
from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.saving.saved_weights import HeldWeights


@dataclass(frozen=True)
class Held:
    """A rank's part of the checkpoint of a step, see `Contents`.

    Args:
        step: number of steps done.
        weights: the model's and its averages'.
    """

    step: int
    weights: HeldWeights
    moments: Mapping[str, Slice]
    state: Mapping[str, Any]
    config: str
    classes: Sequence[str] = ()
    normalization: Any = None

    def contents(self, runtime: Runtime) -> Contents:
        """What is written: the weights of all ranks on rank 0. Collective."""
        kept = self.weights.gathered(runtime)
        return Contents(
            model=kept.model,
            ema=kept.ema,
            averages=kept.averages,
            metadata=self.weights.metadata,
            moments=self.moments,
            state=self.state,
            config=self.config,
            classes=self.classes,
            normalization=self.normalization,
        )
