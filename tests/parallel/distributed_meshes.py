"""Checks on four ranks, for meshes of two dimensions; run by distributed_checks.py."""

from pathlib import Path

from distributed_runs import alone, everything, steps, two_ranks, weights
from torch.testing import assert_close

from speedit_plugins.trainer.parallel.runtime import Runtime


def check_two_copies_of_two_shards_equal_one_process(runtime: Runtime, folder: Path) -> None:
    options = {"ema__halflife_steps": 3.0, "optimizer__max_grad_norm": 0.1}
    sharded = {"plugin": "fsdp2", "sharding__replicate": 2, **options}
    expected = weights(steps(alone(folder, **options), 4))
    whole = steps(two_ranks(runtime, folder, **sharded), 4)
    path, found = whole.save(), weights(whole)
    # One process reads what four have saved, and goes on as they do.
    restored = alone(folder, **options)
    restored.restore(path)
    read = weights(restored)
    resumed = two_ranks(runtime, folder, **sharded)
    resumed.restore(path)
    later, later_expected = weights(steps(resumed, 2)), weights(steps(restored, 2))
    # And four go on bit for bit.
    held = everything(resumed)
    assert_close(held, everything(steps(whole, 2)), rtol=0, atol=0)

    total = sum(parameter.numel() for parameter in restored.model.parameters() if parameter.requires_grad)
    for part in ("weights", "moments", "ema"):
        of_ranks = runtime.gather_objects(held[part])
        # Ranks 0 and 2 hold the first rows of the two copies, ranks 1 and 3 the others.
        for first, second in ((0, 2), (1, 3)):
            assert_close(of_ranks[second], of_ranks[first], rtol=0, atol=0)
        sizes = [sum(value.numel() for value in own.values()) for own in of_ranks]
        # Beside the moments are counts of steps.
        assert part == "moments" or sizes[0] + sizes[1] == total
    # The second copy has nothing to save.
    saved = runtime.gather_objects(len(resumed.engine.moments(runtime)))
    assert saved[0] > 0
    assert saved[1] > 0
    assert saved[2:] == [0, 0]
    # Last, since no other rank would learn of a failure here.
    if runtime.is_main:
        # float32 gradients are summed in two orders, in 6 steps of at most lr = 1e-3.
        assert_close(found, expected, rtol=0, atol=1e-6)
        assert_close(read, found, rtol=0, atol=0)
        assert_close(later, later_expected, rtol=0, atol=1e-6)
