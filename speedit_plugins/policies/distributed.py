"""What the method needs from other ranks: the losses they saw.

Dims: B rows of this rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_losses(index: Tensor, loss: Tensor) -> Tensor:
    """Rows (index, loss) of all ranks in rank order, float32 (N, 2) on the CPU, without losses not finite.

    One host sync on one rank; collective on several.

    Args:
        index: of each sample of this rank, int64 (B,).
        loss: of each, (B,).

    Raises:
        ValueError: another shape.
    """
    if index.shape != loss.shape or index.ndim != 1:
        raise ValueError(
            f"update needs index and loss (B,), got {tuple(index.shape)} and {tuple(loss.shape)}"
        )
    # float32 holds every index below 2^24, and exists on every device.
    rows = gather_rows(torch.stack([index.detach().float(), loss.detach().float()], dim=1)).cpu()
    return rows[rows.isfinite().all(dim=1)]


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (B, C) of all ranks in rank order, B may differ between ranks; the input itself on one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    size = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    # Collectives need one shape on all ranks: pad to the longest, cut after.
    padded = torch.cat([rows, rows.new_zeros(max(map(int, sizes)) - len(rows), rows.shape[1])])
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(s)] for part, s in zip(gathered, sizes, strict=True)])
