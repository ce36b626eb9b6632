"""Changes of a config, as the contestants of a race and the arms of a comparison have them."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

Load = Callable[[str], ModuleType]


def test_a_change_is_of_its_sections_and_no_others(load: Load) -> None:
    merged = load("overrides").merged
    ema = {"type": "halflife", "halflife_steps": 5}
    base: dict[str, Any] = {
        "model": {"type": "DiT", "depth": 6},
        "optimizer": {"type": "AdamW", "lr": 1.0},
        "ema": ema,
        "seed": 1,
    }
    was = copy.deepcopy(base)
    assert merged(base, {"optimizer": {"warmup_steps": 5}}) == {
        **base,
        "optimizer": {"type": "AdamW", "lr": 1.0, "warmup_steps": 5},
    }
    # Parameters of one type are not those of another, but for models, optimizers and policies.
    assert merged(base, {"ema": {"type": "constant"}})["ema"] == {"type": "constant"}
    assert merged(base, {"ema": {"type": "halflife"}})["ema"] == ema
    assert merged(base, {"model": {"type": "MDT"}})["model"] == {"type": "MDT", "depth": 6}
    assert merged(base, {"model": {"depth": 2}})["model"] == {"type": "DiT", "depth": 2}
    assert merged(base, {"optimizer": {"type": "Muon"}})["optimizer"] == {"type": "Muon", "lr": 1.0}
    policy = {"diffusion": {"policy": {"type": "uniform", "weighting": "p2"}}}
    auto = {"diffusion": {"policy": {"type": "auto"}}}
    assert merged(policy, auto)["diffusion"] == {"policy": {"type": "auto", "weighting": "p2"}}
    merged(base, {})["model"]["depth"] = 3
    assert base == was
