import math
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers.attention import (
    SelfAttention,
    attention_kernel,
    sdpa,
    xformers_attention,
)


def explicit_attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v, head by head; (B, N, 3, H, K) -> (B, N, H, K)."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weight = torch.softmax(query @ key.mT / math.sqrt(qkv.shape[-1]), dim=-1)
    return (weight @ value).transpose(1, 2)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for the package in its own layout, (B, N, H, K)."""

    def memory_efficient_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)

    operations = ModuleType("xformers.ops")
    operations.memory_efficient_attention = memory_efficient_attention
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", operations)
    return operations


def test_sdpa_equals_the_formula_and_its_gradient() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 7, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    # Float64: only the order of sums differs.
    assert_close(sdpa(qkv), explicit_attention(qkv), atol=1e-12, rtol=0)
    target = torch.randn(2, 7, 4, 6, dtype=torch.float64)
    gradients = [
        torch.autograd.grad((kernel(qkv) * target).sum(), qkv)[0] for kernel in (sdpa, explicit_attention)
    ]
    assert_close(*gradients, atol=1e-12, rtol=0)


def test_self_attention_projects_before_and_after() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(24, 4, kernel=sdpa).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    mixed = explicit_attention((x @ layer.qkv.weight.T + layer.qkv.bias).view(2, 5, 3, 4, 6)).reshape(
        2, 5, 24
    )
    assert_close(layer(x), mixed @ layer.proj.weight.T + layer.proj.bias, atol=1e-12, rtol=0)


def test_attention_without_positions_is_permutation_equivariant() -> None:
    layer = SelfAttention(24, 4, kernel=attention_kernel("sdpa")).double()
    x, order = torch.randn(1, 6, 24, dtype=torch.float64), torch.tensor([3, 0, 5, 1, 2, 4])
    assert_close(layer(x[:, order]), layer(x)[:, order], atol=1e-12, rtol=0)


def test_an_unknown_kernel_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="unknown attention 'xformer'; did you mean 'xformers'.; known: sdpa, xformers"
    ):
        attention_kernel("xformer")


def test_absent_xformers_is_named_when_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    with pytest.raises(
        ValueError, match=r"needs the package xformers, .* install speedit-plugins\[xformers\]"
    ):
        DiT(4, 2, hidden_size=8, depth=1, num_heads=2, attention="xformers")


@pytest.mark.parametrize("error", [NotImplementedError("no operator found"), RuntimeError("no kernel image")])
def test_xformers_that_cannot_run_here_is_refused(xformers: ModuleType, error: Exception) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise error

    xformers.memory_efficient_attention = refuse
    with pytest.raises(ValueError, match="installed but has no kernel for device '.*' with heads of size 72"):
        attention_kernel("xformers", head_size=72)


def test_the_probe_runs_on_a_real_device_while_a_model_is_built_on_meta(xformers: ModuleType) -> None:
    devices = []
    inner = xformers.memory_efficient_attention
    xformers.memory_efficient_attention = lambda *parts: devices.append(parts[0].device.type) or inner(*parts)
    with torch.device("meta"):
        DiT(4, 2, hidden_size=8, depth=3, num_heads=2, attention="xformers")
    assert devices == ["cuda" if torch.cuda.is_available() else "cpu"]


def test_xformers_equals_sdpa(xformers: ModuleType) -> None:
    qkv = torch.randn(2, 7, 3, 4, 6)
    assert attention_kernel("xformers") is xformers_attention
    # The stand-in runs the same kernel: this tests the layout alone.
    assert torch.equal(xformers_attention(qkv), sdpa(qkv))
