import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.parallel.master_weights import Slice
from speedit_plugins.trainer.training.averages.ema import Ema


def one_weight(value: float = 0.0) -> dict[str, Slice]:
    return {"weight": Slice(0, torch.full((1,), value))}


def average(ema: Ema) -> Tensor:
    return ema.slices["weight"].values


def test_half_of_the_distance_to_a_constant_is_left_after_one_halflife() -> None:
    current = one_weight(0.0)
    ema = Ema(current, halflife_steps=7.0, ramp=False)
    current["weight"].values.fill_(1.0)
    for _ in range(7):
        ema.update()
    assert_close(average(ema).item(), 0.5, rtol=1e-6, atol=0)


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


def test_load_takes_its_slice_of_whole_tensors_and_the_number_of_updates() -> None:
    ema = Ema({"weight": Slice(2, torch.zeros(3))}, halflife_steps=3.0)
    ema.load({"weight": torch.arange(6.0).reshape(2, 3), "other": torch.ones(1)}, 1)
    assert average(ema).tolist() == [2.0, 3.0, 4.0]
    assert ema.decay == 2 / 11


@pytest.mark.parametrize("halflife", [0.0, -1.0, math.nan])
def test_a_halflife_must_be_positive(halflife: float) -> None:
    with pytest.raises(ValueError, match=f"halflife_steps > 0, got {halflife}"):
        Ema(one_weight(), halflife_steps=halflife)
