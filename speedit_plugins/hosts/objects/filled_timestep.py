"""The t that a host draws inside of its training call, filled with ours, and whether the model has seen it.

`q_sample` is the first to get the host's t. There our draw is written into the host's tensor, so that every
later use has it. A watched model confirms it.

Dims: B batch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from speedit_plugins.policies.policy import TimestepDraw


class FilledTimestep:
    """The host's t of one training call.

    Args:
        model: what the host trains.
        known: the hosts for which this is known to work, for messages.
    """

    def __init__(self, model: Any, known: str) -> None:
        self.model = model
        self.draw: TimestepDraw | None = None
        self._known = known
        self._t: Tensor | None = None
        self._version: int | None = None
        self._is_seen = False

    def fill(self, t: Tensor, draw: Callable[[Tensor], TimestepDraw]) -> None:
        """Writes a draw into the host's t (B,). `draw` makes it from a copy of that t."""
        self.draw = draw(t.clone())
        t.copy_(self.draw.index)
        self._t, self._version = t, t._version

    def see(self, t: Tensor) -> None:
        """Notes a t (B,) that goes to the model. Raises ValueError unless it is the drawn one."""
        # If it is the same tensor and nobody wrote to it since, no host-device synchronisation is needed.
        is_ours = t is self._t and t._version == self._version
        if not is_ours and not (self.draw is not None and torch.equal(t, self.draw.index.to(t))):
            raise ValueError(
                "the model gets another t than the policy drew: this host draws or changes t between q_sample"
                f" and the model; known to work: {self._known}"
            )
        self._is_seen = True

    def confirmed(self) -> TimestepDraw:
        """The draw; ValueError unless the model has seen it."""
        if self.draw is None or not self._is_seen:
            raise ValueError(
                "the host's training_losses did not call q_sample and then the model, so its t is not ours;"
                f" known to work: {self._known}"
            )
        return self.draw

    def watched(self, wrapped: Any, model: Any) -> Any:
        """The host's wrapper of a model; it reports every t if this is the model that is trained.

        The variational term calls a function in place of the model, which is not watched.
        """
        return Watched(wrapped, self) if model is self.model else wrapped


class Watched:
    """A host's wrapped model. It reports the t of every call."""

    def __init__(self, model: Any, filled: FilledTimestep) -> None:
        self._model = model
        self._filled = filled

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Any:
        self._filled.see(t)
        return self._model(x, t, **kwargs)
