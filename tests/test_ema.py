import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from speedit_plugins.engine.ema import Ema


def one_weight(value: float = 0.0) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def test_half_of_the_distance_to_a_constant_is_left_after_one_halflife() -> None:
    model = one_weight(0.0)
    ema = Ema(model, halflife_steps=7.0, ramp=False)
    nn.init.constant_(model.weight, 1.0)
    for _ in range(7):
        ema.update()
    assert_close(ema.weights["weight"].item(), 0.5, rtol=1e-6, atol=0)


def test_the_published_decay_of_dit_is_a_halflife_of_6931_steps() -> None:
    assert_close(Ema(one_weight(), halflife_steps=6931.0, ramp=False).decay, 0.9999, rtol=1e-7, atol=0)


def test_the_ramp_follows_its_formula_until_the_decay_is_reached() -> None:
    ema = Ema(one_weight(), halflife_steps=math.log(0.5) / math.log(0.9))
    decays = []
    for _ in range(100):
        decays.append(ema.decay)
        ema.update()
    # (1 + n) / (10 + n) passes 0.9 at n = 80.
    assert_close(decays[:80], [(1 + n) / (10 + n) for n in range(80)])
    assert_close(decays[81:], [0.9] * 19)


def test_frozen_parameters_come_from_the_model_and_averages_are_fp32() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(torch.bfloat16)
    model[0].requires_grad_(False)
    ema = Ema(model, halflife_steps=1.0)
    state = ema.state_dict(model)
    assert set(ema.weights) == {"1.weight", "1.bias"}
    assert all(weight.dtype == torch.float32 for weight in ema.weights.values())
    assert set(state) == set(model.state_dict())
    assert state["0.weight"] is not ema.weights.get("0.weight")
    assert_close(state["0.weight"], model[0].weight.detach())


def test_load_restores_weights_and_number_of_updates() -> None:
    ema, other = Ema(one_weight(1.0), halflife_steps=3.0), Ema(one_weight(5.0), halflife_steps=3.0)
    ema.update()
    other.load(ema.weights, ema.num_updates)
    assert other.weights["weight"].item() == 1.0
    assert other.decay == ema.decay == 2 / 11


@pytest.mark.parametrize("halflife", [0.0, -1.0, math.nan])
def test_a_halflife_must_be_positive(halflife: float) -> None:
    with pytest.raises(ValueError, match=f"halflife_steps > 0, got {halflife}"):
        Ema(one_weight(), halflife_steps=halflife)
