"""Checks optimizers and averages of other kinds on two ranks; run by distributed_checks.py."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from distributed_runs import PLUGINS, alone, everything, steps, two_ranks, weights, without_key_bias
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins.registry import OPTIMIZERS
from speedit_plugins.trainer.parallel.runtime import Runtime
from speedit_plugins.trainer.training.averages.snapshots import (
    posthoc_average,
    read_snapshots,
    write_snapshot,
)
from speedit_plugins.trainer.training.trainer import Trainer

# The packages that some of them need.
NAMES = {
    "AdamW8bit": "bitsandbytes",
    "Adafactor": "torch",
    "Prodigy": "prodigyopt",
    "AdamWScheduleFree": "schedulefree",
    "Muon": "torch",
}
POWER = {"ema": "{type: power, sigma_rel: [0.1, 0.2]}"}


def whole_state(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's state on this rank: every rank has the whole of it."""
    engine = trainer.engine
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    words = ("params", "adjust_lr_fn", "lr")
    return {
        "weights": {name: p.detach() for name, p in trainer.model.named_parameters()},
        "state": {names[id(p)]: dict(state) for p, state in engine.optimizer.state.items()},
        "groups": [
            {k: v for k, v in group.items() if k not in words} for group in engine.optimizer.param_groups
        ],
    }


def check_every_optimizer_goes_on_bit_for_bit_on_two_ranks_and_alone(runtime: Runtime, folder: Path) -> None:
    for name, package in NAMES.items():
        if importlib.util.find_spec(package) is None or (name == "Muon" and not hasattr(torch.optim, "Muon")):
            continue
        options = {"optimizer__type": name, "model__hidden_size": 64, "model__class_dropout_prob": 0.1}
        place = folder / name

        def labelled(text: str, name: str = name) -> str:
            return f"{name}: {text}"

        whole = steps(two_ranks(runtime, place, **options), 6)
        path = steps(first := two_ranks(runtime, place, **options), 3).save()
        one = alone(place, **options)
        one.restore(path)
        assert_close(whole_state(one), whole_state(first), rtol=0, atol=0, msg=labelled)
        resumed = two_ranks(runtime, place, **options)
        resumed.restore(path)
        assert_close(everything(steps(resumed, 3)), everything(whole), rtol=0, atol=0, msg=labelled)
        assert_close(whole_state(resumed), whole_state(whole), rtol=0, atol=0, msg=labelled)
        # Both ranks have taken the same steps.
        ours = torch.cat([p.detach().flatten() for p in resumed.model.parameters()])
        assert torch.equal(*runtime.gather_objects(ours)), name


def check_ones_own_optimizer_goes_on_bit_for_bit_on_shards(runtime: Runtime, folder: Path) -> None:
    class Counting(torch.optim.SGD):
        """Its rate falls with a count in its group."""

        def step(self, closure: Any = None) -> None:
            group = self.param_groups[0]
            group["count"] = group.get("count", 0) + 1
            rate, group["lr"] = group["lr"], group["lr"] / group["count"]
            super().step()
            group["lr"] = rate

    def momentum(params: list[Tensor], lr: float) -> torch.optim.Optimizer:
        return Counting(params, lr=lr, momentum=0.9)

    momentum.plugins = PLUGINS  # type: ignore[attr-defined]  # as a user sets it
    OPTIMIZERS.register_module(name="Momentum", module=momentum)
    expected = weights(steps(alone(folder, optimizer__type="Momentum", optimizer__lr=1e-2), 6))
    for plugin in PLUGINS:
        options = {"optimizer__type": "Momentum", "optimizer__lr": 1e-2, "plugin": plugin}
        whole = steps(two_ranks(runtime, folder / plugin, **options), 6)
        path = steps(two_ranks(runtime, folder / plugin, **options), 3).save()
        resumed = two_ranks(runtime, folder / plugin, **options)
        resumed.restore(path)
        assert_close(everything(steps(resumed, 3)), everything(whole), rtol=0, atol=0)
        found = weights(whole)
        if runtime.is_main:
            assert_close(found, expected, rtol=0, atol=1e-6)


def check_power_averages_on_shards_are_those_of_one_process(runtime: Runtime, folder: Path) -> None:
    expected = without_key_bias(steps(alone(folder, **POWER), 6).averaged_weights())
    for plugin in PLUGINS:
        place = folder / plugin
        whole = steps(two_ranks(runtime, place, plugin=plugin, **POWER), 6)
        averages = whole.averaged_weights()
        if runtime.is_main:
            assert_close(without_key_bias(averages), expected, rtol=0, atol=1e-6)
        first = steps(two_ranks(runtime, place, plugin=plugin, **POWER), 3)
        write_snapshot(place, 3, first.ema, first._shapes, runtime)
        resumed = two_ranks(runtime, place, plugin=plugin, **POWER)
        resumed.restore(first.save())
        steps(resumed, 3)
        for ours, theirs in zip(
            (resumed.ema.slices, *resumed.ema.others.values()),
            (whole.ema.slices, *whole.ema.others.values()),
            strict=True,
        ):
            assert_close(
                {n: p.values for n, p in ours.items()},
                {n: p.values for n, p in theirs.items()},
                rtol=0,
                atol=0,
            )
        runtime.barrier()
        kept, distance = posthoc_average(read_snapshots(place), 0.1, step=3)
        assert distance < 1e-6
        averages = first.averaged_weights()
        if runtime.is_main:
            # float16 has 11 bits, and 2^-24 below its normal numbers.
            assert_close(kept, averages, rtol=2**-11, atol=2**-24)
