"""The loss of each element, made by one function of a host for all of its training scripts.

The function is `conditional_loss(model_pred, target, loss_type, reduction, huber_c)` (sd-scripts). What it
returns is weighed for the newest draw, and after it come the host's own masks and reductions.

Dims: B batch.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from speedit_plugins.hosts.attachment import refuse_double_weights
from speedit_plugins.hosts.draws.weighted_loss import is_constant
from speedit_plugins.policies.policy import TimestepPolicy

FUNCTION = "conditional_loss"
# Functions of a host that weigh its loss, by the beginning of their names.
WEIGHTINGS = "compute_loss_weighting_for_"
_LOSSES = "_speedit_losses"


class Draws(Protocol):
    """What has drawn, and weighs: `SeparateDraws` or `ScriptPolicy`."""

    @property
    def policy(self) -> TimestepPolicy:
        """What draws and weighs."""

    def weigh(self, loss: Tensor) -> Tensor:
        """A loss (B, ...) times the weights of the newest draw; the same tensor if they are all 1."""


class Losses:
    """Which draw the next loss belongs to.

    Args:
        newest: what has drawn for it; None if the host has.
    """

    def __init__(self, newest: Draws | None = None) -> None:
        self.newest = newest


def losses_of(module: ModuleType) -> Losses:
    """Makes a host's `conditional_loss` weigh. The same object comes back for the same module.

    Raises:
        ValueError: the module has no such function.
    """
    own: Callable[..., Tensor] | None = getattr(module, FUNCTION, None)
    if own is None:
        raise ValueError(f"{module.__name__} has no {FUNCTION}, which makes the loss of each element")
    found = getattr(own, _LOSSES, None)
    if isinstance(found, Losses):
        return found
    losses = Losses()

    @wraps(own)
    def conditional_loss(
        model_pred: Tensor, target: Tensor, loss_type: str, reduction: str, huber_c: Tensor | None = None
    ) -> Tensor:
        if losses.newest is None or not torch.is_grad_enabled():
            return own(model_pred, target, loss_type, reduction, huber_c)
        loss = own(model_pred, target, loss_type, "none", huber_c)
        weighed = losses.newest.weigh(loss)
        if weighed is loss and reduction != "none":
            # The host's own reduction gives the host's loss to the bit.
            return own(model_pred, target, loss_type, reduction, huber_c)
        return {"none": weighed, "mean": weighed.mean(), "sum": weighed.sum()}[reduction]

    setattr(conditional_loss, _LOSSES, losses)
    setattr(module, FUNCTION, conditional_loss)
    return losses


def refuse_second_weights(module: ModuleType, losses: Losses) -> None:
    """Makes a host's own weightings raise ValueError beside a policy that weighs or learns.

    A weighting of ones passes.

    Args:
        module: whose functions `compute_loss_weighting_for_...` are replaced.
        losses: of this host.
    """
    for name in [name for name in vars(module) if name.startswith(WEIGHTINGS)]:
        setattr(module, name, _refusing(getattr(module, name), losses))


def refuse_beside(policy: TimestepPolicy, weighing: str, remedy: str) -> None:
    """Raises ValueError if a policy weighs or learns, for a host that weighs its loss; see there."""
    refuse_double_weights(policy, weighing, remedy)
    if policy.learns:
        raise ValueError(
            f"{weighing} already, and {policy.name!r} would learn from the plain error, which is not the loss"
            f" that is minimised: {remedy}, or take a policy that does not learn"
        )


def _refusing(own: Callable[..., Any], losses: Losses) -> Callable[..., Any]:
    is_known = False

    @wraps(own)
    def weighting(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_known
        made = own(*args, **kwargs)
        policy = None if losses.newest is None else losses.newest.policy
        # Looked at once, since the CPU waits for the device.
        if is_known or policy is None or not torch.is_grad_enabled():
            return made
        is_known = True
        if (policy.learns or not is_constant(policy.weight)) and made is not None and bool((made != 1).any()):
            refuse_beside(policy, "the host's weighting_scheme weighs its loss", "drop --weighting_scheme")
        return made

    return weighting
