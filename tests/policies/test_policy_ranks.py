"""Two processes over gloo: losses are gathered, and a learning policy stays equal on both ranks."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
from speedit_plugins.policies import measurement
from speedit_plugins.policies.distributed import gather_rows

T = 6
# Rows (index, loss) of each rank for each call. The lengths differ, and one rank has no row in the last call.
CALLS = [
    [
        torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 3.0]]),
        torch.tensor([[3.0, 4.0], [4.0, 5.0], [5.0, 6.0], [0.0, 7.0], [1.0, 8.0]]),
    ],
    [torch.tensor([[2.0, 1.0], [3.0, 1.5], [4.0, 9.0], [5.0, 0.5]]), torch.zeros(0, 2)],
]


def new_policy() -> TimestepPolicy:
    config = {"type": "loss_second_moment", "history": 2, "normalize": "loss"}
    return build_policy(config, NoiseSchedule.cosine(T))


# The tables of the learned laws and weights are new in each update.
LEARNED = [
    {
        "density": {"type": density, **options},
        "weighting": {"type": "uncertainty", "refresh_updates": 1},
    }
    for density, options in (
        ("info_noise", {"warmup_losses": 0, "refresh_updates": 1}),
        ("loss_balanced", {"warmup_losses": 0, "refresh_updates": 1}),
        ("adaptive", {"round_updates": 5}),
    )
]
# Eight losses of every timestep and more, falling.
NUM_ROUNDS = 8


def learned_tables(rank: int | None) -> list[Tensor]:
    """Density and weight of each learned policy, taught the rows of a rank, or None: of both as one."""
    tables = []
    for config in LEARNED:
        policy = build_policy(config, NoiseSchedule.cosine(T))
        for number in range(NUM_ROUNDS):
            for call in CALLS:
                rows = torch.cat(call) if rank is None else call[rank]
                policy.update(rows[:, 0].long(), rows[:, 1] * 0.9**number)
        tables += [policy.density, policy.weight]
    return tables


def data(rank: int, step: int) -> Tensor:
    """What a rank sees in a step: other data on each rank, of another size; once of another shape on one."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    samples = torch.randn(30 + 10 * rank, 4, 2, 2, generator=generator) * torch.tensor([3.0, 1.0])
    return samples[..., :1] if (rank, step) == (1, 1) else samples


def measured(rank: int | None) -> Tensor:
    """The density that `auto` has found from the data of a rank, or None: of both as one."""
    config = {"type": "auto", "num_samples": 200}
    policy = build_policy(config, NoiseSchedule.rectified_flow(100))
    for step in range(4):
        # 100 samples of each rank: of rank 0 the first 100, of rank 1 those of the steps 0, 2 and 3.
        steps = [step] if rank is not None else []
        for each in steps:
            policy.observe(data(int(rank or 0), each))
    if rank is None:
        seen = [torch.cat([data(r, s) for s in range(4) if (r, s) != (1, 1)])[:100] for r in (0, 1)]
        for batch in torch.cat(seen).split(50):
            policy.observe(batch)
    assert not policy.needs_data
    return policy.density


def num_gathered(rank: int) -> int:
    """How many samples a rank gets for the measurement, if the bound on their values is 40 samples."""
    before, measurement.MAX_VALUES = measurement.MAX_VALUES, 40 * 16
    waiting = measurement.DataMeasurement(num_samples=200)
    waiting._keep(data(rank, 0))
    rows = waiting._of_all_ranks(torch.device("cpu"))
    measurement.MAX_VALUES = before
    return len(rows)


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    policy, gathered = new_policy(), []
    for call in CALLS:
        gathered.append(gather_rows(call[rank]))
        policy.update(call[rank][:, 0].long(), call[rank][:, 1])
    tables: dict[str, Any] = {"density": policy.density, "weight": policy.weight}
    tables["learned"] = learned_tables(rank)
    tables["measured"] = measured(rank)
    tables["num_gathered"] = num_gathered(rank)
    torch.save({"gathered": gathered, **tables}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_as_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    results: list[dict[str, Any]] = [
        torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    ]
    policy = new_policy()
    for number, call in enumerate(CALLS):
        in_rank_order = torch.cat(call)
        policy.update(in_rank_order[:, 0].long(), in_rank_order[:, 1])
        for result in results:
            assert_close(result["gathered"][number], in_rank_order, atol=0, rtol=0)
    for result in results:
        assert torch.equal(result["density"], policy.density)
        assert torch.equal(result["weight"], policy.weight)
    # Each of the six timesteps has its two losses, so the density has begun to follow the losses.
    assert float(policy.density.max() - policy.density.min()) > 0.1
    # The losses are about 4, and the weights are divided by their mean.
    assert policy.mean_weight < 0.5
    as_one = learned_tables(None)
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result["learned"], as_one, strict=True))
        assert_close(result["measured"], measured(None), atol=1e-9, rtol=0)
        assert result["num_gathered"] == 40
    # All of them have begun to follow the losses.
    assert all(float(table.max() - table.min()) > 0.01 for table in as_one)


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.ones(3, 2)
    assert gather_rows(rows) is rows
