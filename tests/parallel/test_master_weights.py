import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.trainer.parallel.master_weights import (
    Master,
    gather,
    load_optimizer,
    optimizer_layout,
    optimizer_slices,
    owned,
)
from speedit_plugins.trainer.parallel.runtime import Runtime


def replicated(values: Tensor, key: Tensor | None = None) -> Master:
    flat = values.view(-1)
    key = flat if key is None else key
    return Master("w", tuple(values.shape), 0, flat, key, tuple(values.shape), is_replicated=True)


@given(size=st.integers(1, 60), world_size=st.integers(1, 9))
def test_the_ranks_own_each_element_of_a_replicated_parameter_once(size: int, world_size: int) -> None:
    master = replicated(torch.arange(float(size)))
    parts = [owned([master], Runtime(rank=rank, world_size=world_size))["w"] for rank in range(world_size)]
    assert torch.cat([part.values for part in parts]).tolist() == list(range(size))
    for part in parts:
        assert len(part.values) == 0 or part.values[0] == part.start
        assert len(part.values) <= math.ceil(size / world_size)


def test_slices_are_views_of_the_masters() -> None:
    values = torch.zeros(4)
    part = owned([replicated(values)], Runtime())["w"]
    values.fill_(3.0)
    assert part.values.tolist() == [3.0] * 4


def test_what_one_process_gathers_has_the_parameters_shape() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    parts = owned([replicated(values)], Runtime())
    assert_close(gather(parts, {"w": (2, 3)}, Runtime())["w"], values, rtol=0, atol=0)


def test_moments_go_to_a_padded_shard_and_come_back() -> None:
    # Elements 3 and 4 of a parameter with five, in a shard of three that ends in padding.
    shard = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([shard])
    master = Master("w", (5,), 3, shard.detach()[:2], shard, (3,))
    whole = {
        "exp_avg/w": torch.arange(5.0),
        "exp_avg_sq/w": torch.arange(5.0) + 1,
        "step/w": torch.tensor([7.0]),
    }
    load_optimizer(optimizer, [master], whole)
    state = optimizer.state[shard]
    assert state["exp_avg"].tolist() == [3.0, 4.0, 0.0]
    assert state["step"] == 7
    found = optimizer_slices(optimizer, [master], Runtime(rank=1, world_size=2))
    assert {name: (part.start, part.values.tolist()) for name, part in found.items()} == {
        "exp_avg/w": (3, [3.0, 4.0]),
        "exp_avg_sq/w": (3, [4.0, 5.0]),
        "step/w": (0, [7.0]),
    }
    # The optimizer can continue from this state.
    shard.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[shard]["step"] == 8


def test_an_optimizer_before_its_first_step_has_no_moments() -> None:
    parameter = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter])
    master = replicated(parameter.detach(), key=parameter)
    assert optimizer_slices(optimizer, [master], Runtime()) == {}
    load_optimizer(optimizer, [master], {})
    assert not optimizer.state[parameter]


def test_a_shards_state_of_another_size_is_refused_where_a_slice_of_it_would_be_saved() -> None:
    shard = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([shard], lr=1.0)
    optimizer.state[shard] = {"row": torch.zeros(1)}
    master = Master("w", (5,), 3, shard.detach()[:2], shard, (3,))
    with pytest.raises(
        ValueError, match=r"state row/w of shape \(1,\) is not one of each element; wanted plugin ddp"
    ):
        optimizer_slices(optimizer, [master], Runtime(rank=1, world_size=2))


@given(size=st.integers(1, 40), world_size=st.integers(1, 5))
def test_a_state_of_any_size_is_put_together_from_the_ranks(size: int, world_size: int) -> None:
    parameter = torch.zeros(3, 2)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    optimizer.state[parameter] = {"row": torch.arange(size).view(size, 1), "count": 2**40 + 1}
    master = replicated(parameter, key=parameter)
    ranks = [Runtime(rank=rank, world_size=world_size) for rank in range(world_size)]
    parts = [optimizer_slices(optimizer, [master], rank)["row/w"] for rank in ranks]
    layout = optimizer_layout(optimizer, [master])
    again = torch.optim.SGD([parameter], lr=1.0)
    load_optimizer(again, [master], {"row/w": torch.cat([part.values for part in parts])}, layout)
    assert again.state[parameter]["row"].tolist() == [[value] for value in range(size)]
    assert again.state[parameter]["row"].dtype == torch.int64
    # Beyond the whole numbers of float32.
    assert again.state[parameter]["count"] == 2**40 + 1
