"""The linear layer over both kernels: values and gradients, when oneDNN's is taken, and compiled."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers import linear
from speedit_plugins.trainer.models.layers.linear import ChosenProducts, Linear, Products, product

needs_onednn = pytest.mark.skipif(not linear.has_onednn(), reason="this build of torch has no oneDNN product")
CHOICES = [Products(*flags) for flags in itertools.product((False, True), repeat=3)]
ALL = Products(forward=True, by_input=True, by_weight=True)


@pytest.fixture
def _no_least_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for products of any size."""
    monkeypatch.setattr(linear, "LEAST_WORK", 0)


def refuse(*_: object) -> None:
    raise AssertionError("this product is not oneDNN's")


@needs_onednn
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (1, 24), (2, 3, 4, 24)])
def test_values_and_gradients_are_those_of_a_linear_layer(shape: tuple[int, ...], choice: Products) -> None:
    layer = nn.Linear(24, 10).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(*shape[:-1], 10, dtype=torch.float64)
    layer(x).backward(gradient)
    given = [t.detach().float().requires_grad_() for t in (x, layer.weight, layer.bias)]
    found = ChosenProducts.apply(*given, *choice)
    found.backward(gradient.float())
    # Float32 sums of at most 40 products of normal numbers.
    assert_close(found.double(), layer(x), atol=1e-5, rtol=0)
    for mine, wanted in zip(given, (x, layer.weight, layer.bias), strict=True):
        assert_close(mine.grad.double(), wanted.grad, atol=1e-5, rtol=0)


@needs_onednn
@pytest.mark.parametrize("choice", CHOICES)
def test_each_product_is_computed_by_the_kernel_that_is_chosen(
    choice: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recorded(*operands: torch.Tensor | None, onednn: bool) -> torch.Tensor:
        seen.append(onednn)
        return product(*operands, onednn=onednn)

    monkeypatch.setattr(linear, "product", recorded)
    given = [torch.randn(size, requires_grad=True) for size in ((3, 4), (2, 4), (2,))]
    ChosenProducts.apply(*given, *choice).sum().backward()
    assert tuple(seen) == choice


@needs_onednn
@pytest.mark.parametrize("choice", CHOICES)
def test_strided_inputs_and_gradients_are_read_as_they_lie(choice: Products) -> None:
    layer = nn.Linear(6, 4, bias=False)
    x = torch.randn(6, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x.t()).sum(), (x, layer.weight))
    # The gradient of a sum is one number, expanded.
    value = ChosenProducts.apply(x.t(), layer.weight, None, *choice)
    assert_close(torch.autograd.grad(value.sum(), (x, layer.weight)), expected, atol=1e-6, rtol=0)


@needs_onednn
def test_what_needs_no_gradient_gets_none() -> None:
    weight, bias = torch.randn(4, 6), torch.randn(4, requires_grad=True)
    ChosenProducts.apply(torch.randn(5, 6), weight, bias, *ALL).sum().backward()
    assert_close(bias.grad, torch.full((4,), 5.0))
    with torch.no_grad():
        assert not ChosenProducts.apply(torch.randn(5, 6), weight, bias, *ALL).requires_grad


@pytest.mark.usefixtures("_no_least_work")
def test_small_products_other_types_and_autocast_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(8, 4), torch.randn(3, 8)
    expected = nn.Linear.forward(layer, x)
    monkeypatch.setattr(ChosenProducts, "apply", refuse)
    assert torch.equal(layer(x), expected)
    layer.onednn = ALL
    with pytest.raises(AssertionError, match="not oneDNN's"):
        layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert copy.deepcopy(layer).double()(x.double()).dtype == torch.float64
    assert copy.deepcopy(layer).to("meta")(x.to("meta")).shape == (3, 4)

    class Fetched(nn.Parameter):
        pass

    other = Linear(8, 4)
    other.onednn = ALL
    other.weight, other.bias = Fetched(layer.weight.detach()), layer.bias
    assert torch.equal(other(x), expected)
    monkeypatch.setattr(linear, "LEAST_WORK", 3 * 8 * 4 + 1)
    assert torch.equal(layer(x), expected)


@needs_onednn
@pytest.mark.usefixtures("_no_least_work")
@pytest.mark.parametrize("choice", [ALL, Products(by_weight=True)])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_model_over_it_has_the_gradients_of_the_same_model_without(
    is_compiled: bool, choice: Products
) -> None:
    model = DiT(8, 2, hidden_size=16, depth=2, num_heads=2, num_classes=3, class_dropout_prob=0.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    plain = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.onednn = choice
    if is_compiled:
        # The graphs run operation by operation: what is traced is the same.
        model.compile(backend="aot_eager")
    inputs = (torch.randn(4, 4, 8, 8), torch.tensor([3, 50, 500, 900]), torch.tensor([0, 1, 2, 1]))
    for each in (model, plain):
        each(*inputs).square().mean().backward()
    names = [name for name, p in plain.named_parameters() if p.requires_grad]
    found, expected = dict(model.named_parameters()), dict(plain.named_parameters())
    for name in names:
        scale = float(expected[name].grad.abs().max())
        # Two blocks of float32 sums, of at most 256 products.
        assert_close(found[name].grad, expected[name].grad, atol=1e-5 * max(scale, 1e-3), rtol=1e-3)
    torch._dynamo.reset()
