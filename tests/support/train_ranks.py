"""Trains a stand-in of each seam on two ranks, for 200 steps: point 9 of the contract. Prints what holds."""

import sys
from collections.abc import Iterator

import flow_standins
import host_standins
import latent_diffusion_standin
import mmagic_standin
import open_sora_standin
import torch
import torch.distributed as dist
from conformance import imagen, script
from conformance.latent_diffusion import LatentSeam
from conformance.mmagic import MmagicSeam
from conformance.open_sora import OpenSoraSeam
from conformance.seam import Seam
from conformance.whole_training import whole_training
from torch import Tensor

from speedit_plugins import NoiseSchedule, build_policy
from speedit_plugins.hosts.draws.draw_stream import DrawStream

NUM_STEPS = 200


def gathered(rows: Tensor) -> Tensor:
    """The rows of both ranks, in rank order."""
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


def check_strata() -> None:
    """Four micro-batches of one sample on two ranks have one of eight strata each, whatever their seeds.

    Ranks of one group draw alike, whatever their seeds.
    """
    torch.manual_seed(dist.get_rank())
    policy, group = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(ranks_alike=2)
    policy.advance()
    first, second = gathered(group.draw(policy, 4).index).chunk(2)
    assert torch.equal(first, second), "a group draws differently"
    policy, stream = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(num_strata=8)
    for _ in range(3):
        drawn = []
        for _ in range(4):
            policy.advance()
            drawn.append(stream.draw(policy, 1).index)
        strata = gathered(torch.cat(drawn)) * 8 // 1000
        assert sorted(strata.tolist()) == list(range(8)), strata


def seams() -> Iterator[tuple[str, Seam]]:
    """Every seam, with a name."""
    for name in ("dit", "dit_3d", "guided_diffusion", "mdt"):
        yield name, host_standins.SEAMS[name]
    for name in ("transport", "rectified flow"):
        yield name, flow_standins.SEAMS[name]
    yield "script", script.SEAMS[0]
    for version in ("1.1.0", "1.2.0"):
        with open_sora_standin.installed(version):
            yield f"open_sora {version}", OpenSoraSeam(version)
    with mmagic_standin.installed():
        yield "mmagic", MmagicSeam()
    with latent_diffusion_standin.installed() as ddpm:
        for name in ("DDPM", "LatentDiffusion"):
            yield name, LatentSeam(ddpm, name)
    with imagen.installed() as (seam, _):
        yield "imagen", seam


def main() -> None:
    """Runs the checks in this rank."""
    dist.init_process_group("gloo")
    for name, seam in seams():
        # A step of Imagen's unet takes long. check_hosts.py makes 200 of them, in one process.
        num_steps = 40 if name == "imagen" else NUM_STEPS
        whole_training(seam, num_steps, rank=dist.get_rank(), gather=gathered)
        if dist.get_rank() == 0:
            sys.stdout.write(f"holds: {name}\n")
    check_strata()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
