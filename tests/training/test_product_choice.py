"""The choice of products in a run: made per shape, set in every layer, saved, resumed and logged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import small_config, small_trainer
from test_trainer import everything, fit
from torch import nn
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.models.dit import DiT
from speedit_plugins.trainer.models.layers import linear
from speedit_plugins.trainer.models.layers.linear import ChosenProducts, Linear, Products
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training import train as training
from speedit_plugins.trainer.training.products import choice
from speedit_plugins.trainer.training.products.choice import (
    choose_products,
    describe,
    layer_shapes,
    restore_products,
    saved_products,
)

pytestmark = pytest.mark.skipif(not linear.has_onednn(), reason="this build of torch has no oneDNN product")
# Products by (input, output) features, at 32 channels: qkv, projection and final layer, MLP.
WINNERS = {
    (32, 96): Products(forward=True),
    (32, 32): Products(by_input=True, by_weight=True),
    (32, 128): Products(forward=True, by_weight=True),
}


def injected(num_rows: int, num_in: int, num_out: int) -> Products:
    return WINNERS.get((num_in, num_out), Products())


def refuse(*_: object) -> None:
    raise AssertionError("nothing is measured here")


@pytest.fixture(autouse=True)
def _no_least_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets oneDNN compute products of any size."""
    monkeypatch.setattr(linear, "LEAST_WORK", 0)
    monkeypatch.setattr(choice, "LEAST_WORK", 0)


def small_dit() -> DiT:
    return DiT(8, 2, hidden_size=32, depth=2, num_heads=2, num_classes=3)


def config(batch_size: int = 6, precision: str = "fp32") -> Any:
    return SimpleNamespace(data=SimpleNamespace(batch_size=batch_size), precision=precision)


def test_shapes_are_those_of_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_dit()
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, Linear):
            layer.register_forward_hook(
                lambda layer, inputs, output, name=name: seen.update(
                    {name: (output.numel() // layer.out_features, layer.in_features, layer.out_features)}
                )
            )
    model(torch.randn(5, 4, 8, 8), torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    found = layer_shapes(small_dit(), 5)
    assert found == seen
    # A block has 16 tokens per sample, its modulation one vector per sample.
    assert found["blocks.0.mlp.fc1"] == (80, 32, 128)
    assert found["blocks.0.adaLN_modulation.1"] == (5, 32, 192)
    monkeypatch.setattr(choice, "LEAST_WORK", 80 * 32 * 128)
    assert set(layer_shapes(model, 5)) == {f"blocks.{n}.mlp.{fc}" for n in (0, 1) for fc in ("fc1", "fc2")}


def test_each_shape_is_measured_once_and_gets_its_own_products() -> None:
    measured = []

    def measure(*shape: int) -> Products:
        measured.append(shape)
        return injected(*shape)

    model = small_dit()
    choose_products(model, config(), Runtime(), measure=measure)
    assert len(measured) == len(set(measured))
    assert set(measured) == set(layer_shapes(model, 6).values())
    for layer in (module for module in model.modules() if isinstance(module, Linear)):
        expected = WINNERS.get((layer.in_features, layer.out_features), Products())
        assert layer.onednn == expected
    assert Linear.onednn == Products()


def test_layers_of_one_size_and_other_rows_are_chosen_apart() -> None:
    class TwoRows(nn.Module):
        input_size, in_channels, num_classes = 2, 3, 0

        def __init__(self) -> None:
            super().__init__()
            self.few, self.many = Linear(2, 2), Linear(2, 2)

        def forward(self, x: torch.Tensor, *_: object) -> torch.Tensor:
            return self.many(x) + self.few(x[:, 0, 0])[:, None, None]

    model = TwoRows()
    choose_products(model, config(), Runtime(), measure=lambda rows, *_: Products(forward=rows > 6))
    assert model.many.onednn == Products(forward=True)
    assert model.few.onednn == Products()
    assert describe(model) == "oneDNN's products in 1 of 2 x 2 (forward)"


class SeveralRanks(Runtime):
    """This rank of two; the other rank has found `other`."""

    def __init__(self, rank: int, other: Any) -> None:
        super().__init__(rank, 2)
        object.__setattr__(self, "other", other)

    def gather_objects(self, item: Any) -> list[Any]:
        return [item, self.other] if self.rank == 0 else [self.other, item]


def test_all_ranks_take_the_choice_of_rank_0_for_their_share_of_the_batch() -> None:
    rows = []

    def measure(num_rows: int, *_: int) -> Products:
        rows.append(num_rows)
        return Products(by_weight=True)

    of_rank_0 = {"blocks.0.mlp.fc1": Products(forward=True), "blocks.1.mlp.fc1": Products()}
    model = small_dit()
    choose_products(model, config(), SeveralRanks(1, of_rank_0), measure=measure)
    assert saved_products(model) == {"blocks.0.mlp.fc1": [True, False, False]}
    assert set(rows) == {3, 3 * 16}
    # The other rank lacks the kernel.
    choose_products(model, config(), SeveralRanks(0, {}), measure=measure)
    assert saved_products(model) == {}


@pytest.mark.parametrize("case", ["bf16", "cuda", "no kernel", "sharded"])
def test_nothing_is_measured_where_there_is_no_choice(
    case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Sharded(nn.Parameter):
        pass

    model = small_dit()
    if case == "no kernel":
        monkeypatch.setattr(choice, "has_onednn", lambda: False)
    if case == "sharded":
        for layer in (module for module in model.modules() if isinstance(module, Linear)):
            layer.weight = Sharded(layer.weight.detach())
    device = torch.device("cuda" if case == "cuda" else "cpu")
    precision = "bf16" if case == "bf16" else "fp32"
    choose_products(model, config(precision=precision), Runtime(device=device), measure=refuse)
    assert saved_products(model) == {}
    assert capsys.readouterr().out == ""


def test_the_choice_is_in_the_log_in_the_environment_and_in_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training, "choose_products", lambda *given: choose_products(*given, measure=injected))
    training.train(small_config(tmp_path, max_training_steps=1, sample_every=0))
    words = (
        "oneDNN's products in 2 of 32 x 128 (forward, by_weight), "
        "3 of 32 x 32 (by_input, by_weight), 2 of 32 x 96 (forward)"
    )
    assert f"linear layers: {words}, chosen as the fastest here in " in capsys.readouterr().out
    assert json.loads((tmp_path / "environment.json").read_text())["linear layers"] == words
    # A resumed run measures nothing and writes the same words.
    (tmp_path / "environment.json").unlink()
    monkeypatch.setattr(training, "choose_products", refuse)
    training.train(small_config(tmp_path, max_training_steps=2, sample_every=0))
    assert json.loads((tmp_path / "environment.json").read_text())["linear layers"] == words


def test_a_resumed_run_goes_on_with_the_products_it_was_started_with_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    apply = ChosenProducts.apply
    monkeypatch.setattr(ChosenProducts, "apply", lambda *given: calls.append(given[-3:]) or apply(*given))
    whole = small_trainer(tmp_path / "whole", max_training_steps=8)
    choose_products(whole.model, whole.config, whole.runtime, measure=injected)
    fit(whole)
    expected, taken = everything(whole), len(calls)
    assert set(calls) == {tuple(products) for products in WINNERS.values()}

    first = small_trainer(tmp_path / "parts", max_training_steps=4)
    choose_products(first.model, first.config, first.runtime, measure=injected)
    fit(first)
    resumed = small_trainer(tmp_path / "parts", max_training_steps=8)
    assert saved_products(resumed.model) == {}
    resumed.restore(tmp_path / "parts" / "checkpoints" / "step_0000004")
    assert saved_products(resumed.model) == saved_products(whole.model)
    fit(resumed)
    assert_close(everything(resumed), expected, rtol=0, atol=0)
    assert len(calls) == 2 * taken


def test_fsdp2_gathers_what_the_chosen_products_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    apply = ChosenProducts.apply
    monkeypatch.setattr(ChosenProducts, "apply", lambda *given: calls.append(given[-3:]) or apply(*given))
    monkeypatch.setattr(training, "choose_products", lambda *given: choose_products(*given, measure=injected))
    weights = {}
    for plugin in ("ddp", "fsdp2"):
        calls.clear()
        training.train(small_config(tmp_path / plugin, plugin=plugin, max_training_steps=4, sample_every=0))
        assert set(calls) == {tuple(products) for products in WINNERS.values()}
        weights[plugin] = checkpoints.load(tmp_path / plugin / "checkpoints" / "step_0000004").model
    # As in test_fully_sharded.py: the gradient norms of the two round differently.
    assert_close(weights["fsdp2"], weights["ddp"], rtol=0, atol=1e-6)


def test_a_machine_without_the_kernel_goes_on_with_torchs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_dit()
    saved = {"blocks.0.mlp.fc1": [True, False, True]}
    restore_products(model, saved, Runtime())
    assert saved_products(model) == saved
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(choice, "has_onednn", lambda: False)
    restore_products(model, saved, Runtime())
    assert saved_products(model) == {}
    assert capsys.readouterr().out == (
        "linear layers: torch's products; the run was started with oneDNN's, which a process lacks here\n"
    )
    # A run with torch's products has nothing to lose.
    restore_products(model, {}, Runtime())
    assert capsys.readouterr().out == ""
