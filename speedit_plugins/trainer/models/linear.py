"""A linear layer whose float32 products are oneDNN's on CPUs where these are faster.

Torch's builds for x86 multiply float32 matrices by MKL, which takes AVX-512 on Intel's processors alone. On
AMD's oneDNN, in the same builds, is twice as fast where these have AVX-512, and by a tenth with AVX2.
Measured in docs/benchmarks/2026-11-26-throughput.md.

Dims: N rows, I features in, O features out.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Multiply-adds from which it is faster, forward and backward, on one thread and on two: below, an operation
# of Python's costs more than it gains.
_LEAST_WORK = 2**23


class Linear(nn.Linear):
    """`nn.Linear`, (..., I) -> (..., O), with the same parameters, and values up to rounding."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        # Asked here, since torch.compile would read the machine's files into each graph.
        self.prefers_onednn = prefers_onednn()

    def forward(self, input: Tensor) -> Tensor:
        if self.prefers_onednn and _suits_onednn(input, self.weight):
            return cast(Tensor, OneDnnProduct.apply(input, self.weight, self.bias))
        return super().forward(input)


class OneDnnProduct(torch.autograd.Function):
    """x (..., I), weight (O, I) and bias (O,) or None -> x weight^T + bias, float32, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1]).contiguous()  # (N, O)
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(rows, weight.t(), None).view(x.shape) if of_x else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t(), None) if of_weight else None,
            rows.sum(dim=0) if of_bias else None,
        )


@cache
def prefers_onednn() -> bool:
    """Whether this machine is one where oneDNN's float32 products are faster than MKL's."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and _is_amd() and _has_product()


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether there is enough work, of a kind that it can do."""
    return (
        # Other classes see to their own operations: ColossalAI's parameters are fetched by torch's layer.
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and math.prod(x.shape) * len(weight) >= _LEAST_WORK
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _compiled_product(x, weight, bias) if torch.compiler.is_compiling() else _onednn(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile makes of linear layers with constant weights; not public, hence `_has_product`.
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))


@torch.library.custom_op("speedit_plugins::product", mutates_args=())
def _compiled_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same, as an operation that torch.compile leaves alone: in its own weights are constants."""
    return _onednn(x, weight, bias)


@_compiled_product.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], len(weight))


def _has_product() -> bool:
    """Whether this build of torch has the operation, and it computes what is taken for granted here."""
    # On the CPU also where models are built on the meta device.
    x, weight, bias, wanted = (
        torch.full(shape, value, device="cpu")
        for shape, value in (((2, 3), 1.0), ((4, 3), 2.0), ((4,), 1.0), ((2, 4), 7.0))
    )
    try:
        return torch.equal(_onednn(x, weight, bias), wanted)
    except (AttributeError, RuntimeError):
        return False


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
