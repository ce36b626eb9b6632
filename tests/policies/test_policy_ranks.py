"""Two processes over gloo: losses are gathered, and a learning policy stays equal on both ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from speedit_plugins import NoiseSchedule, TimestepPolicy, build_policy
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


def run_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    policy, gathered = new_policy(), []
    for call in CALLS:
        gathered.append(gather_rows(call[rank]))
        policy.update(call[rank][:, 0].long(), call[rank][:, 1])
    tables = {"density": policy.density, "weight": policy.weight}
    torch.save({"gathered": gathered, **tables}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_learn_as_one(tmp_path: Path) -> None:
    mp.spawn(run_rank, args=(str(tmp_path),), nprocs=2)
    results: list[dict[str, Tensor]] = [
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


def test_one_process_gathers_its_own_rows() -> None:
    rows = torch.ones(3, 2)
    assert gather_rows(rows) is rows
