"""`plugin: fsdp2` in one process; the checks on two ranks are in distributed_checks.py."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import in_one_order
from distributed_runs import without_key_bias
from runs import arguments, small_config
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoints
from speedit_plugins.trainer.config.validation import ConfigError
from speedit_plugins.trainer.logging.tracking import read_metrics
from speedit_plugins.trainer.model_copies import copy_with
from speedit_plugins.trainer.parallel.fully_sharded import LossScale, without_weights
from speedit_plugins.trainer.parallel.units import units
from speedit_plugins.trainer.shards import is_shard, whole
from speedit_plugins.trainer.training.train import train


@pytest.mark.parametrize(
    ("device", "sharding"),
    [
        ("cpu", {}),
        pytest.param("cuda", {}, marks=pytest.mark.gpu),
        pytest.param("cuda", {"sharding__cpu_offload": True}, marks=pytest.mark.gpu),
    ],
)
def test_a_lone_process_trains_measures_and_goes_on_as_under_ddp(
    tmp_path: Path, device: str, sharding: dict[str, Any]
) -> None:
    options = {
        "device": device,
        "log_every": 2,
        "validate_every": 4,
        "data__held_out_samples": 8,
        "sample_every": 4,
        "sample_classes": "[3]",
        "profile_every": 4,
    }
    of_plugin = {"ddp": {"plugin": "ddp"}, "fsdp2": {"plugin": "fsdp2", **sharding}}
    rows, weights = {}, {}
    for plugin, own in of_plugin.items():
        other = of_plugin["fsdp2" if plugin == "ddp" else "ddp"]
        with in_one_order(device):
            assert train(small_config(tmp_path / plugin, max_training_steps=4, **options, **own)) == 0
            assert train(small_config(tmp_path / plugin, max_training_steps=6, **options, **other)) == 0
        rows[plugin] = read_metrics(tmp_path / plugin)
        weights[plugin] = checkpoints.load(tmp_path / plugin / "checkpoints" / "step_0000006").model
        assert (tmp_path / plugin / "grids" / "step_0000004.png").exists()
    # One process sums in one order; the gradient norm is of one sum of squares, or of a sum of roots.
    atol = 1e-6
    if device == "cuda":
        # Shards in the memory of the CPU are stepped by the CPU, with its rounding. AdamW turns a difference
        # in the last bits into that share of a step, of 2e-3, and into a whole step where a gradient is zero.
        weights, atol = {plugin: without_key_bias(dict(found)) for plugin, found in weights.items()}, 1e-5
    assert_close(weights["fsdp2"], weights["ddp"], rtol=0, atol=atol)
    for key in ("loss", "val_loss", "profile_mse"):
        found, expected = ([row[key] for row in rows[name] if key in row] for name in ("fsdp2", "ddp"))
        assert expected
        assert_close(found, expected, rtol=1e-4, atol=1e-5)


WATCHED_RUN = """
import sys
import speedit_plugins.trainer.training.train
from speedit_plugins.cli import main

def sharding():
    own = "speedit_plugins.trainer.parallel.fully_sharded"
    return {name for name in sys.modules if "fsdp" in name or name in (own, "torch.distributed.tensor")}

print("imports:", *sharding())
# The samplers load diffusers, which loads the compiler, which loads torch's sharding.
import torch._dynamo
before = sharding()
assert main(sys.argv[1:]) == 0
print("run:", *(sharding() - before))
"""


def test_nothing_of_it_is_imported_unless_it_is_chosen(tmp_path: Path) -> None:
    options = ["-c", "configs/image/digits/speedit.yaml", "-p", "train"]
    command = [sys.executable, "-c", WATCHED_RUN, *options, *arguments(tmp_path, max_training_steps=1)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0].strip(), lines[-1].strip()) == ("imports:", "run:")


def test_its_options_need_it_and_offloading_needs_another_device(tmp_path: Path) -> None:
    for key, value in (("replicate", 2), ("cpu_offload", True)):
        with pytest.raises(ConfigError, match=rf"sharding\.{key}: has no effect with plugin zero2; wanted"):
            small_config(tmp_path, plugin="zero2", **{f"sharding__{key}": value})
    config = small_config(tmp_path, plugin="fsdp2", device="cpu", sharding__cpu_offload=True)
    with pytest.raises(
        ValueError, match=r"sharding\.cpu_offload: has no effect on the device cpu; wanted false"
    ):
        train(config)
    # A second training in this process, as in a notebook, joins a group of its own.
    assert not dist.is_initialized()


def test_units_are_the_members_of_the_outermost_lists() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))

    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.blocks = nn.ModuleList([block(), nn.Identity(), block()])
    model.net = nn.Module()
    model.net.ups = nn.ModuleList([nn.Linear(2, 2)])
    assert units(model) == [model.blocks[0], model.blocks[2], model.net.ups[0]]


def test_a_copy_without_weights_takes_others_and_no_memory() -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20)).eval()
    twin = without_weights(model)
    assert sum(p.untyped_storage().nbytes() for p in twin.parameters()) == 4 * 4
    # A change of the model's buffers is one of the copy's.
    model[1].running_mean.fill_(0.5)
    x = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    found = functional_call(twin, dict(model.named_parameters()), (x,))
    assert_close(found, model(x), rtol=0, atol=0)


def test_parameters_that_are_shared_are_so_in_a_copy() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    twin = copy_with(model, parameter=lambda own: own + 1, buffer=lambda own: own)
    assert twin[1].weight is twin[0].weight
    assert_close(twin[0].weight.detach(), model[0].weight.detach() + 1, rtol=0, atol=0)
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.fixture
def group() -> Iterator[None]:
    """A group of this process alone. A training that failed may have left one."""
    is_ours = not dist.is_initialized()
    if is_ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if is_ours:
        dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_a_shard_is_told_apart_and_gathered() -> None:
    plain = torch.arange(6.0).view(3, 2)
    shard = distribute_tensor(plain, init_device_mesh("cpu", (1,)), [Shard(0)])
    assert (is_shard(shard), is_shard(plain), is_shard(nn.Parameter(plain))) == (True, False, False)
    assert whole(plain) is plain
    assert type(whole(shard)) is torch.Tensor
    assert_close(whole(shard), plain, rtol=0, atol=0)


def test_the_loss_scale_moves_as_torchs_does() -> None:
    # Torch's own, with gradients that overflow in the same steps.
    ours, steps = LossScale(), [True] * 1999 + [False, True] + [True] * 2000
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2000)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for is_finite in steps:
        theirs.scale(parameter.sum()).backward()
        if not is_finite:
            parameter.grad.fill_(torch.inf)
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(is_finite=is_finite)
    assert ours.value == theirs.get_scale()
    assert ours.growth_step == theirs.state_dict()["_growth_tracker"]
