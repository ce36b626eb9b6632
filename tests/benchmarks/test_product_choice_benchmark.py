"""The benchmark of the measured products: its table for known times, and a small case through all parts."""

from collections.abc import Callable
from types import ModuleType

import pytest

from speedit_plugins.trainer.models.layers.linear import Products, has_onednn
from speedit_plugins.trainer.training.products import timing

Load = Callable[[str], ModuleType]


def test_the_table_has_deciles_and_ratios_within_a_round(load: Load) -> None:
    module = load("speed.product_choice")
    measured = {
        "choices": [("torch's products", 0.25)],
        "ratios": {"4x2x3": [[0.0, 1.0], [2.0, 2.0], [3.0, 3.0]]},
        "steps": {"torch's": [2.0, 4.0, 6.0], "measured": [1.0, 4.0, 12.0]},
    }
    lines = module.table(measured).splitlines()
    assert lines[0] == "torch's products in 0.25 s"
    assert "| 4x2x3 | 0.10, 0.50, 0.90 | 2.00, 2.00, 2.00 | 3.00, 3.00, 3.00 |" in lines
    # The ratios are 2, 1 and 0.5.
    assert lines[-1] == "| measured | 4.000 s | 1.000 (0.750, 1.500) |"


@pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN product")
def test_every_ratio_of_the_three_products_is_kept_and_the_rule_is_as_before(load: Load) -> None:
    rule = timing.NUM_PAIRS, timing.is_clear
    found = load("speed.product_choice").product_ratios((8, 4, 4), num_pairs=4)
    assert [len(each) for each in found] == [4, 4, 4]
    assert (timing.NUM_PAIRS, timing.is_clear) == rule


@pytest.mark.skipif(not has_onednn(), reason="this build of torch has no oneDNN product")
def test_a_small_case_steps_with_each_choice_in_turn(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    module, steps = load("speed.product_choice"), load("speed.training_steps")
    seen = []
    step = module._step

    def recorded(trainer: object, products: dict[str, list[bool]], clock: object) -> float:
        seen.append(products)
        return step(trainer, products, clock)

    monkeypatch.setattr(module, "_step", recorded)
    monkeypatch.setattr(module, "layer_shapes", lambda *_: {"blocks.0.mlp.fc1": (8, 4, 4)})
    measured = module.measure(steps.Case("DiT-S/8", 2, 8), 2, iter(range(10_000)).__next__, num_choices=1)
    # For products this small torch's are chosen. The third side takes oneDNN's wherever oneDNN can compute.
    plain, onednn = {}, {"blocks.0.mlp.fc1": [True] * len(Products._fields)}
    assert seen == [plain, plain, onednn, onednn, plain, plain, plain, plain, onednn]
    assert measured["choices"] == [("torch's products", 1)]
    assert measured["steps"] == {"torch's": [1, 1], "measured": [1, 1], "oneDNN's": [1, 1]}
