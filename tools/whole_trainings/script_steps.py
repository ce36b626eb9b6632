"""The steps of a training whose script makes the loss itself: t, errors, and the reported loss.

A host's `prepare` says where these three are; see `runs.Script`.

Dims: B batch.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from whole_trainings.recording import Record


class Steps:
    """Fills a record, one entry for each loss that the script reports.

    Args:
        record: gets t, and `loss`, a scalar, and `mse` (B,) as terms.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._t: list[Tensor] = []
        self._errors: list[Tensor] = []

    def watch_model(self, model: type, argument: str, method: str = "forward") -> None:
        """Records what a class of models gets as this argument of a method, in calls with gradients."""
        own: Callable[..., Any] = vars(model)[method]
        signature = inspect.signature(own)

        @functools.wraps(own)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self._t.append(signature.bind(*args, **kwargs).arguments[argument].detach().clone())
            return own(*args, **kwargs)

        setattr(model, method, watched)

    def watch_error(self, owner: Any, function: str, is_repeated: bool = False) -> None:
        """Records the mean error (B,) of each sample from a function that returns errors (B, ...).

        Args:
            owner: has the function.
            function: its name.
            is_repeated: whether the host makes the same error again in a step.
        """
        own: Callable[..., Tensor] = getattr(owner, function)

        @functools.wraps(own)
        def error(*args: Any, **kwargs: Any) -> Tensor:
            made = own(*args, **kwargs)
            if made.requires_grad and not (is_repeated and self._errors):
                self.error(made)
            return made

        setattr(owner, function, error)

    def error(self, made: Tensor) -> None:
        """Records errors (B, ...) of the host, before any weights."""
        made = made.detach()
        self._errors.append(made.mean(list(range(1, made.dim()))) if made.dim() > 1 else made.clone())

    def reported(self, loss: Any) -> None:
        """Ends a step with the loss that the script reports.

        Raises:
            RuntimeError: the model was not called once, or there is not one error.
        """
        if len(self._t) != 1 or len(self._errors) != 1:
            raise RuntimeError(
                f"a step called the model {len(self._t)} times and made {len(self._errors)} errors, wanted 1"
                " of each"
            )
        self._record.t.append(self._t.pop())
        scalar = loss.detach().clone() if isinstance(loss, Tensor) else torch.tensor(loss)
        self._record.terms.append({"loss": scalar, "mse": self._errors.pop()})
