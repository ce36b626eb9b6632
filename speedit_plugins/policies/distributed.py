"""Losses gathered from all ranks, so that a learning policy stays the same on each of them.

Dims: B samples of this rank, N samples of all ranks, C columns.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def num_processes() -> int:
    """How many processes train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_losses(index: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Indices int64 (N,) and losses float64 (N,) of all ranks in rank order, on the CPU.

    Losses that are not finite are left out. With several ranks this is a collective call. It waits for the
    device.

    Args:
        index: timestep index of each sample of this rank, int64 (B,).
        loss: loss of each sample of this rank, (B,).

    Raises:
        ValueError: the shapes differ, or are not (B,); or indices that are no integers.

    Example:
        >>> gather_losses(torch.tensor([3, 5]), torch.tensor([0.5, float("nan")]))
        (tensor([3]), tensor([0.5000], dtype=torch.float64))
    """
    if index.shape != loss.shape or index.ndim != 1 or index.is_floating_point():
        raise ValueError(
            f"update needs whole numbers index (B,) and loss (B,), got {index.dtype} {tuple(index.shape)} and"
            f" {loss.dtype} {tuple(loss.shape)}"
        )
    # float32 holds every index below 2^24 exactly, and every device has it.
    rows = gather_rows(torch.stack([index.detach().float(), loss.detach().float()], dim=1)).cpu()
    rows = rows[rows.isfinite().all(dim=1)]
    return rows[:, 0].long(), rows[:, 1].double()


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (N, C) of all ranks in rank order. B may differ between ranks. One process returns its own rows.

    Args:
        rows: the rows of this rank, (B, C).
    """
    if num_processes() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    # A collective needs the same shape on all ranks: pad to the longest, and cut afterwards.
    padded = torch.cat([rows, rows.new_zeros(max(map(int, sizes)) - len(rows), rows.shape[1])])
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(s)] for part, s in zip(gathered, sizes, strict=True)])
