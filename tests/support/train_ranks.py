"""Trains each stand-in of a host on two ranks, for 200 steps: point 9 of the contract. Prints what holds."""

import sys

import flow_standins
import host_standins
import torch
import torch.distributed as dist
from conformance import script
from conformance.whole_training import whole_training
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.draw_stream import DrawStream

NUM_STEPS = 200


def gathered(rows: Tensor) -> Tensor:
    """The rows of both ranks, in rank order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def check_strata() -> None:
    """Four micro-batches of one sample on two ranks have one of eight strata each, whatever their seeds."""
    torch.manual_seed(dist.get_rank())
    policy, stream = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(num_strata=8)
    for _ in range(3):
        drawn = []
        for _ in range(4):
            policy.advance()
            drawn.append(stream.draw(policy, 1).index)
        strata = gathered(torch.cat(drawn)) * 8 // 1000
        assert sorted(strata.tolist()) == list(range(8)), strata


def main() -> None:
    """Runs the checks in this rank."""
    dist.init_process_group("gloo")
    seams = {
        **host_standins.SEAMS,
        **flow_standins.SEAMS,
        **{f"script, {each.name}": each for each in script.SEAMS[:1]},
    }
    for name, seam in seams.items():
        whole_training(seam, NUM_STEPS, rank=dist.get_rank(), gather=gathered)
        if dist.get_rank() == 0:
            sys.stdout.write(f"holds: {name}\n")
    check_strata()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
