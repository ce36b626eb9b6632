"""A linear layer that can leave some of its float32 products on a CPU to oneDNN.

Torch's builds for x86 multiply float32 matrices by MKL, and have oneDNN's product as well. Which one is
faster depends on the processor and the shape: oneDNN is twice as fast on an AMD with AVX-512, and slower in
most products on an AMD with AVX2 alone. A training measures both and sets `Linear.onednn`, see
`training/products/choice.py`. Everywhere else the layer computes as torch's does.

Dims: N rows, I features in, O features out.
"""

import math
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiply-adds from which oneDNN may compute a product. Below, the Python function around it costs about what
# a faster product saves, and with a row for each sample memory's speed is measured, not the kernel's.
LEAST_WORK = 2**25


class Products(NamedTuple):
    """Which products of a layer oneDNN computes: the output, its gradient by input, that by weight."""

    forward: bool = False
    by_input: bool = False
    by_weight: bool = False


class Linear(nn.Linear):
    """`nn.Linear`, (..., I) -> (..., O), with the same parameters, and the same values up to rounding."""

    onednn = Products()

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        if any(self.onednn) and _suits_onednn(input, self.weight):
            return cast(Tensor, ChosenProducts.apply(input, self.weight, self.bias, *self.onednn))
        return super().forward(input)


class ChosenProducts(torch.autograd.Function):
    """x (..., I), weight (O, I), bias (O,) or None, `Products` -> x weight^T + bias, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *flags: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.products = Products(*flags)
        return product(x, weight, bias, onednn=ctx.products.forward)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()  # (N, O)
        inputs = x.reshape(-1, x.shape[-1])  # (N, I)
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        return (
            product(rows, weight.t(), None, onednn=ctx.products.by_input).view(x.shape) if of_x else None,
            product(rows.t(), inputs.t(), None, onednn=ctx.products.by_weight) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
            *[None] * len(ctx.products),
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None, *, onednn: bool) -> Tensor:
    """x weight^T + bias of float32 on the CPU, by oneDNN or by torch's own kernel."""
    if not onednn:
        return F.linear(x, weight, bias)
    return _compiled_product(x, weight, bias) if torch.compiler.is_compiling() else _onednn(x, weight, bias)


@cache
def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's product, and it computes what is taken for granted here."""
    # On the CPU also where models are built on the meta device.
    x, weight, bias, wanted = (
        torch.full(shape, value, device="cpu")
        for shape, value in (((2, 3), 1.0), ((4, 3), 2.0), ((4,), 1.0), ((2, 4), 7.0))
    )
    try:
        return torch.equal(_onednn(x, weight, bias), wanted)
    except (AttributeError, RuntimeError):
        return False


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether there is enough work, of a kind that oneDNN's product can do."""
    return (
        # Other classes see to their own operations: ColossalAI's parameters are fetched by torch's layer.
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and math.prod(x.shape) * len(weight) >= LEAST_WORK
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile makes of linear layers with constant weights; not public, hence `has_onednn`.
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


@torch.library.custom_op("speedit_plugins::product", mutates_args=())
def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same, as an operation that torch.compile leaves alone: in its own weights are constants."""
    return _onednn(x, weight, bias)


@_compiled_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))
