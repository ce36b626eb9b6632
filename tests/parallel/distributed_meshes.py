"""Checks on four ranks, for meshes of two dimensions; run by distributed_checks.py."""

from pathlib import Path

import torch
from distributed_runs import alone, everything, steps, two_ranks, weights, without_key_bias
from torch.testing import assert_close

from speedit_plugins.trainer import checkpoint
from speedit_plugins.trainer.parallel.runtime import Runtime


def check_two_copies_of_two_shards_equal_one_process(runtime: Runtime, folder: Path) -> None:
    options = {"ema__halflife_steps": 3.0, "optimizer__max_grad_norm": 0.1}
    sharded = {"plugin": "fsdp2", "sharding__replicate": 2, **options}
    expected = weights(steps(reference := alone(folder, **options), 4))
    whole = steps(two_ranks(runtime, folder, **sharded), 4)
    found = weights(whole)
    if runtime.is_main:
        # float32 gradients are summed in two orders, in 4 steps of at most lr = 1e-3.
        assert_close(found, expected, rtol=0, atol=1e-6)
    # Ranks 0 and 2 hold the first rows of the two copies, ranks 1 and 3 the others.
    for part in ("weights", "moments", "ema"):
        of_ranks = runtime.gather_objects(everything(whole)[part])
        for first, second in ((0, 2), (1, 3)):
            assert_close(of_ranks[second], of_ranks[first], rtol=0, atol=0)
        sizes = [sum(value.numel() for value in held.values()) for held in of_ranks]
        assert sizes[0] + sizes[1] == sum(value.numel() for value in everything(reference)[part].values())

    # Saved by the first copy, read by one process and by four.
    path = whole.save()
    assert sum(len(held) for held in runtime.gather_objects(whole.engine.moments(runtime))[2:]) == 0
    restored = alone(folder, **options)
    restored.restore(path)
    if runtime.is_main:
        saved = checkpoint.load(path)
        assert_close(without_key_bias(saved.model), found, rtol=0, atol=0)
        assert_close(weights(restored), found, rtol=0, atol=0)
    resumed = two_ranks(runtime, folder, **sharded)
    resumed.restore(path)
    assert_close(everything(steps(resumed, 2)), everything(steps(whole, 2)), rtol=0, atol=0)
    found, expected = weights(resumed), weights(steps(restored, 2))
    if runtime.is_main:
        assert_close(found, expected, rtol=0, atol=1e-6)
        assert all(torch.isfinite(value).all() for value in found.values())
