"""A host's loss with a weight for each sample on its squared error, or on the whole of it.

Dims: B batch, F frames.
"""

from typing import Any, cast

import torch
from torch import Tensor

from speedit_plugins.hosts.draws.recomputation import is_first_of_two
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy


def scaled(error: Tensor, weight: Tensor) -> Tensor:
    """Errors (B, ...) times the weight (B,) of each sample, in the dtype of the errors."""
    return weight.to(error.dtype).view(-1, *[1] * (error.dim() - 1)) * error


def weighted_mse(loss: Tensor, mse: Tensor, rest: Tensor | None, weight: Tensor) -> Tensor:
    """A host's loss (B,) with its share of the mse (B,) times the weight (B,); its other terms stay.

    Args:
        loss: the host's; the mse, times any factor, plus any other terms.
        mse: the term that is weighed.
        rest: the variational term `vb` (B,), if there is one.
        weight: of each sample.

    Raises:
        ValueError: the loss has a gradient, and the mse has no part in it.
    """
    factor = _share(loss, mse)
    if is_first_of_two() and not torch.equal(loss, mse if rest is None else mse + rest):
        raise ValueError(
            "torch.utils.checkpoint runs the training call without gradients at first, where the share of the"
            " mse in the host's loss cannot be found: call checkpoint with use_reentrant=False"
        )
    with torch.no_grad():
        plain, weighed = (mse, weight * mse) if rest is None else (mse + rest, weight * mse + rest)
        # If the loss is this sum to the bit, it is made again from its terms, since a difference would round
        # a small weight away. This is decided for each sample: the CPU need not wait for the device.
        value = torch.where(loss == factor * plain, factor * weighed, loss + factor * (weight - 1) * mse)
    if not loss.requires_grad:
        return value
    # The gradient goes through the host's own loss, since a term that is 0 now has one too.
    mse.register_hook(lambda gradient: weight.to(gradient.dtype) * gradient)  # type: ignore[no-untyped-call]  # torch's
    return cast(Tensor, _WithValue.apply(loss, value))  # type: ignore[no-untyped-call]  # torch's


class _WithValue(torch.autograd.Function):
    """A value (B,) with the gradient of a host's loss (B,)."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _share(loss: Tensor, mse: Tensor) -> Tensor:
    """The derivative (B,) of a loss (B,) by the mse (B,): its factor. 1 if the loss has no gradient."""
    if not loss.requires_grad:
        return torch.ones_like(loss)
    factor = None
    if mse.requires_grad:
        (factor,) = torch.autograd.grad(loss.sum(), mse, retain_graph=True, allow_unused=True)
    if factor is None:
        raise ValueError(
            "the host's loss is not made of the tensor that it reports as mse (a detached copy?), so the mse"
            " in it cannot be weighed; wanted a policy of scope 'loss'"
        )
    return factor.to(loss.dtype)


def draw_for_loss(draw: TimestepDraw, loss: Tensor, policy: TimestepPolicy) -> TimestepDraw:
    """The draw with one row for each value of a host's loss.

    Args:
        draw: of the step; (B,), or (B, F) if each frame has a t of its own.
        loss: (B,), or (B, F) beside such a draw.
        policy: that drew.

    Raises:
        ValueError: the loss has another shape, such as that of a batch's mean; or the frames of a sample have
            several weights, or a policy learns from them, and the loss is one for the sample.
    """
    if loss.shape == draw.index.shape:
        return draw
    is_per_sample = draw.index.dim() > 1 and loss.shape == draw.index.shape[:1]
    weighs_alike = is_constant(policy.weight) and not policy.learns
    if is_per_sample and (is_shared(draw.index) or weighs_alike):
        return draw.map(lambda each: each.flatten(1)[:, 0])
    raise ValueError(
        f"the host's loss has shape {tuple(loss.shape)}, wanted one value for each drawn t,"
        f" {tuple(draw.index.shape)}: neither the mean of a batch nor that of several t can be weighed"
    )


def is_shared(t: Tensor) -> bool:
    """Whether all columns of timesteps (B, ...) are the same: the frames of a sample share their t."""
    rows = t.flatten(1)
    return bool((rows == rows[:, :1]).all())


def is_one(weight: Tensor) -> bool:
    """Whether a table (T,) weighs nothing: it is 1 for every timestep."""
    return bool((weight == 1).all())


def is_constant(weight: Tensor) -> bool:
    """Whether a table (T,) has one value for every timestep."""
    return bool((weight == weight[0]).all())
