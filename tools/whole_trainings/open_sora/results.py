"""What the runs of Open-Sora's scripts left behind: checkpoints, resumed draws, and the law of its flow.

Dims: B batch, F latent frames.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from speedit_plugins import NoiseSchedule
from speedit_plugins.policies.schedule import CONVERGENCE_SNR
from whole_trainings import checks
from whole_trainings.checks import Check
from whole_trainings.recording import Record
from whole_trainings.runs import Run

NUM_TIMESTEPS = 1000
_GRID = 200_000


def hosts_schedule() -> NoiseSchedule:
    """The linear schedule as iddpm of 1.1 has it: cumulated in float32, from betas that it derived anew."""
    exact = NoiseSchedule.linear(NUM_TIMESTEPS).alphas_cumprod
    betas = (1 - exact / torch.cat([torch.ones_like(exact[:1]), exact[:-1]])).float()
    return NoiseSchedule.from_alphas_cumprod(torch.cumprod(1 - betas, 0).double())


def checkpoint(work: Path, name: str, steps: int) -> Path:
    """The folder of a run's checkpoint after so many steps."""
    found = sorted((work / name).glob(f"*/epoch*-global_step{steps}"))
    return found[-1] if found else work / name / "no checkpoint"


def weights(folder: Path) -> dict[str, Tensor]:
    """The EMA of a checkpoint; empty if there is none."""
    path = folder / "ema.pt"
    return torch.load(path, weights_only=True) if path.is_file() else {}


def equal_runs(ours: Run, hosts: Run, steps: int) -> Check:
    """Whether the policy `uniform` gives the losses and the checkpoint of the run without the plugin."""
    found = checks.same_steps(ours.records[0], hosts.records[0])
    pair = [weights(checkpoint(run.host.work, run.name, steps)) for run in (ours, hosts)]
    equal = checks.same_tensors(*pair) and bool(pair[0])
    return Check(bool(found.holds and equal), f"{found.words}; equal ema.pt: {equal}")


def resumed(long: Run, resumed: Run, start: int, steps_per_epoch: int) -> Check:
    """Whether the host took its checkpoint over, and the policy draws what it would have drawn next.

    Args:
        long: the uninterrupted run.
        resumed: by `--load` of the checkpoint of `long` after `start` steps.
        start: steps before the checkpoint.
        steps_per_epoch: of the data.
    """
    epoch, step = divmod(start, steps_per_epoch)
    if step == 0:
        epoch, step = epoch - 1, steps_per_epoch
    seen, all_t = resumed.records[0].t, long.records[0].t
    whole = resumed.said(f"at epoch {epoch} step {step}") and len(seen) > 0
    goes_on = whole and equal(seen, all_t[start : start + len(seen)])
    words = f"--load: {len(seen)} steps from step {start} on; the draws go on: {goes_on}"
    return Check(bool(goes_on), words)


def equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return len(first) == len(second) and all(map(torch.equal, first, second))


def alike(records: Sequence[Record]) -> bool:
    """Whether all ranks saw the same t."""
    first = records[0].t
    return len(first) > 0 and all(equal(record.t, first) for record in records[1:])


def thinned_law(records: Sequence[Record], *, k: float, shift: dict[int, float]) -> Check:
    """The law of a logit-normal flow with a shift, k times rarer past the boundary, which moves with it.

    Args:
        records: of the ranks.
        k: of the policy.
        shift: of the host's draws, by F.
    """
    time = (torch.arange(_GRID, dtype=torch.float64) + 0.5) / _GRID
    density = torch.exp(-0.5 * torch.logit(time) ** 2) / (time * (1 - time))
    boundary = 1 / (1 + CONVERGENCE_SNR**0.5)
    density = density * torch.where(time > boundary, 1 / k, 1.0)
    shares, seen = torch.zeros(10, dtype=torch.float64), []
    for record in records:
        for t, shape in zip(record.t, record.shapes, strict=True):
            s = shift[shape[2]]
            tenth = (10 * s * time / (1 + (s - 1) * time)).long().clamp(max=9)
            share = torch.zeros(10, dtype=torch.float64).index_add_(0, tenth, density)
            shares += len(t) * share / share.sum()
            seen.append(t.float() / NUM_TIMESTEPS)
    return checks.law(shares / shares.sum(), seen)
