"""The random numbers of a host's draws: one stream for each data-parallel rank, by training step.

Many hosts seed all ranks alike. If the draws came from the host's global generator, all ranks would then
train at the same timesteps. So a draw has a generator of its own, seeded with the host's seed
(`torch.initial_seed`), the rank, and the training step of the policy. The host's global generator stays as it
is, and a resumed training goes on with the draws that it would have made.

Dims: B timesteps of one draw, N strata.
"""

import contextlib
import hashlib
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from speedit_plugins.policies.distributed import num_processes
from speedit_plugins.policies.draws import drawing_device
from speedit_plugins.policies.policy import TimestepDraw, TimestepPolicy

_numbers = itertools.count()
# Modules of hosts with sequence parallelism that return their data-parallel group (Open-Sora 1.0 to 1.3).
_PARALLEL_STATES = ("opensora.acceleration.parallel_states",)


@dataclass(frozen=True)
class Replica:
    """This process among those that train on different data.

    Args:
        rank: in [0, size).
        size: how many such processes, or groups of processes, there are.
    """

    rank: int = 0
    size: int = 1


def replica(ranks_alike: int | None = None) -> Replica:
    """The replica of this process.

    Args:
        ranks_alike: how many consecutive ranks train on the same data: the size of a tensor- or
            sequence-parallel group. None is the host's own data-parallel group, if it has a known one, or 1.

    Raises:
        ValueError: the number of processes is not a multiple of `ranks_alike`; or it is None, and there are
            process groups of some of the processes.
    """
    rank, size = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, size = dist.get_rank(), dist.get_world_size()
    if ranks_alike is None and size > 1:
        group = _hosts_group()
        if group is not None:
            return Replica(dist.get_rank(group), dist.get_world_size(group))
        _refuse_subgroups(rank, size)
        return Replica(rank, size)
    ranks_alike = ranks_alike or 1
    if size % ranks_alike:
        raise ValueError(f"ranks_alike needs to divide the {size} processes, got {ranks_alike}")
    return Replica(rank // ranks_alike, size // ranks_alike)


class DrawStream:
    """Random numbers for the draws of one policy.

    Args:
        generator: draws follow it alone, whatever the rank; None is a stream for each rank and step.
        ranks_alike: see `replica`; 1 if all ranks differ, the number of processes if all draw alike.
        num_strata: N. The distribution is split into N equally likely strata, and each N timesteps in a row
            have one of each, in random order: over the ranks, and over calls in a row such as the
            micro-batches of an accumulation. None draws independently.
        part: tells the streams of one object apart.

    Raises:
        ValueError: `ranks_alike` < 1, `num_strata` < 2, or one of them beside a generator.

    Example:
        >>> import torch
        >>> from speedit_plugins import NoiseSchedule, build_policy
        >>> policy, stream = build_policy("uniform", NoiseSchedule.linear(1000)), DrawStream(num_strata=4)
        >>> policy.advance()
        >>> (stream.draw(policy, 4).index // 250).sort().values.tolist()
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        *,
        ranks_alike: int | None = None,
        num_strata: int | None = None,
        part: int = 0,
    ) -> None:
        for name, value, least in (("ranks_alike", ranks_alike, 1), ("num_strata", num_strata, 2)):
            if value is not None and generator is not None:
                raise ValueError(f"{name} has no effect beside a generator: leave out one of them")
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} needs a whole number >= {least}, got {value!r}")
        self.generator = generator
        self.ranks_alike = ranks_alike
        self.num_strata = num_strata
        self._part = part
        self._number: int | None = None
        self._common_seed: int | None = None

    def for_part(self, part: int) -> "DrawStream":
        """A stream with the same options for one part of an object, with random numbers of its own."""
        return DrawStream(self.generator, ranks_alike=self.ranks_alike, num_strata=self.num_strata, part=part)

    def check(self, policy: TimestepPolicy) -> None:
        """Raises ValueError if a policy cannot be drawn in strata over several calls."""
        if self.num_strata is None:
            return
        if policy.stratified or draws_pairs(policy):
            how = "is stratified by batch (stratified=False in its config)"
            how = how if policy.stratified else "draws in pairs"
            raise ValueError(f"num_strata needs a policy with independent draws, and {policy.name!r} {how}")

    def draw(
        self,
        policy: TimestepPolicy,
        batch_size: int,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> TimestepDraw:
        """The draw (B,) of the training step that the policy has begun, on a device.

        Args:
            policy: draws; `check` has let it pass.
            batch_size: B, >= 1.
            device: of the returned tensors.
            seed: of the host; None is `torch.initial_seed()`. A stream with a generator does not use it.
        """
        if self.generator is not None or torch.device(device).type == "meta":
            return policy.draw(batch_size, device=device, generator=self.generator)
        step, place, here = policy.num_steps - 1, drawing_device(device), replica(self.ranks_alike)
        seed = self._seed_of(here, seed)
        generator = _seeded(place, seed, here.rank, step)
        if self.num_strata is None:
            return policy.draw(batch_size, device=device, generator=generator)
        first = policy.num_drawn * here.size + here.rank * batch_size
        strata = torch.cat(list(self._strata(first, batch_size, place, seed)))
        policy.num_drawn += batch_size
        quantile = torch.rand(batch_size, dtype=torch.float64, device=place, generator=generator)
        # The sum can round up to N. A quantile of 1 would be past the last timestep.
        quantile = ((strata + quantile) / self.num_strata).clamp(max=1 - 2**-53)
        return policy.draw_at(quantile, device=device)

    @contextlib.contextmanager
    def hosts_generators(self, step: int, device: torch.device) -> Iterator[None]:
        """The host's global generators are seeded by this stream, and afterwards are what they were before.

        For hosts that draw their timesteps themselves.

        Args:
            step: number of training steps before this one.
            device: that the host trains on; it may draw there or on the CPU.
        """
        if self.generator is not None:
            drawn = torch.randint(2**62, (1,), generator=self.generator, device=self.generator.device)
            seed = int(drawn)
        else:
            here = replica(self.ranks_alike)
            seed = _seed(self._seed_of(here), here.rank, step)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            # Not `torch.manual_seed`, which seeds every device.
            torch.default_generator.manual_seed(seed)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(seed)
            yield

    def _strata(self, first: int, batch_size: int, place: torch.device, seed: int) -> Iterator[Tensor]:
        """Strata of the timesteps `first` to `first + B - 1` of all that are drawn, in pieces."""
        N, last = self.num_strata or 1, first + batch_size
        for block in range(first // N, math.ceil(last / N)):
            order = torch.randperm(N, device=place, generator=_seeded(place, seed, block))
            yield order[max(first - block * N, 0) : last - block * N]

    def _seed_of(self, here: Replica, seed: int | None = None) -> int:
        """The seed of all draws of this stream: of the host, and of the stream's number in this process."""
        if self._number is None:
            # In the order of the first draws, since some ranks may make objects that only sample.
            self._number = next(_numbers)
        seed = torch.initial_seed() if seed is None else seed
        if self.num_strata is not None or here.size != num_processes():
            # Ranks have to agree, and a host may seed each by itself, or anew in the middle of the training.
            if self._common_seed is None:
                row = [seed]
                if num_processes() > 1:
                    dist.broadcast_object_list(row, src=0)
                (self._common_seed,) = row
            seed = self._common_seed
        return _seed(seed, self._number, self._part)


def draws_pairs(policy: TimestepPolicy) -> bool:
    """Whether the timesteps of one batch depend on each other. Their density then depends on B."""
    return not torch.equal(policy.density_for(1), policy.density)


def _seed(*parts: int) -> int:
    """A seed made of numbers. Streams of different numbers have nothing in common."""
    text = ",".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _seeded(place: torch.device, *parts: int) -> torch.Generator:
    return torch.Generator(place).manual_seed(_seed(*parts))


def _hosts_group() -> Any:
    for name in _PARALLEL_STATES:
        group_of = getattr(sys.modules.get(name), "get_data_parallel_group", None)
        if group_of is not None:
            return group_of()
    return None


def _refuse_subgroups(rank: int, size: int) -> None:
    """Raises ValueError if this process is in a group of some of the processes; they may share a batch."""
    # torch has no public list of its groups.
    groups: dict[Any, dict[int, int]] = getattr(
        getattr(dist.distributed_c10d, "_world", None), "pg_group_ranks", {}
    )
    sizes = sorted({len(ranks) for ranks in groups.values() if rank in ranks} - {1, size})
    if sizes:
        raise ValueError(
            f"this process is in groups of {', '.join(map(str, sizes))} of the {size} processes, and ranks of"
            " a tensor- or sequence-parallel group have to draw the same timesteps: pass ranks_alike (the"
            " launcher: --ranks-alike), how many consecutive ranks train on the same data; 1 if none do"
        )
